// A 3x3 convolution by Winograd's method, as the forward pass and the data gradient share it.
#pragma once

#include "caches.h"
#include "parallel.h"
#include "scratch.h"
#include "winograd_weights.h"

namespace ran::cpu::RAN_ISA {

// Blocks of tiles that are a task each, of a size that does not depend on the number of threads.
struct Blocks {
  int64_t tiles, block;
  int64_t count() const { return (tiles + block - 1) / block; }
};

// What the convolution of `tiles` tiles with `terms` channels in and `columns` out does with memory:
//   many tiles: a block's points stay in the second-level cache while the weight's stream by;
//   few: all tiles at once, and the weight's points are made a panel at a time just before use. All tiles' points are
//   then at most 160 * 36 values a channel, and the weight's, four times its size, are never all there.
struct ConvolvePlan {
  bool few;
  Blocks blocks;
  int64_t group;  // columns whose products are kept until their outputs are made

  ConvolvePlan(int points, int64_t tiles, int64_t terms, int64_t columns) {
    constexpr int64_t kFew = 160, kMany = 192;  // tiles; channels
    few = tiles <= kFew && terms * columns >= kMany * kMany;
    const int64_t block = terms * columns > 256 * 256 ? 48 : 12;  // the larger, the less often the weight streams by
    blocks = {tiles, few ? tiles : std::min(tiles, round_up(block, kTileRows))};
    const int64_t cached = second_level_cache() / 4 / int64_t(sizeof(float)) / points / blocks.block;
    group = few ? kPanel : std::clamp<int64_t>(cached / kPanel * kPanel, kPanel, round_up(columns, kPanel));
  }
};

// finish(row of the block, place, outputs, first column, lanes, block) takes each tile's outputs, `lanes` channels of
// them; the tiles of a block come in order for every column. prefetch(first tile, last, part, parts) asks the cache for
// what it will need. `panels`: the packed weight, or null, to be made from `weight`.
template <class F, typename T, typename Activate, typename Finish, typename Prefetch>
void convolve(const T* x, const Weight<T>& weight, const float* panels, const ConvShape& s, const ConvolvePlan& plan,
              const Activate& activate, Finish&& finish, Prefetch&& prefetch_outputs) {
  constexpr int kPoints = F::n * F::n;
  const TileGrid<F::m> grid(s);
  const Panels layout(weight);
  const int64_t terms = layout.terms, columns = layout.columns, block = plan.blocks.block;
  const int64_t values_step = apart(block * round_up(terms, kRun)), products_step = apart(block * plan.group);

  const auto transform = [&](float* values, int64_t first, int64_t tile) {
    float* const row = values + (tile - first) * kRun;
    input_points<F>(x, s, weight.terms(), grid.at(tile), 0, weight.terms(), values_step, activate,
                    [&](int64_t c) { return row + c / kRun * kRun * block + c % kRun; });
  };
  // Of columns [from, to), the products with terms [begin, end), a panel of which has `panel_terms`.
  const auto multiply = [&](float* products, const float* values, const float* panel, int64_t panel_step,
                            int64_t panel_terms, int64_t rows, int64_t from, int64_t to, int64_t begin, int64_t end,
                            auto&& prefetch) {
    for (int point = 0; point < kPoints; ++point) {
      prefetch(point);
      for (int64_t column = from; column < to; column += kPanel)
        multiply_panel<false>(products + point * products_step + (column - from) * block,
                              values + point * values_step + begin * block, block * kRun,
                              panel + point * panel_step + (column - from) * panel_terms, rows,
                              panel_width(column, columns), end - begin, begin > 0);
    }
  };
  const auto output = [&](const float* products, int64_t first, int64_t rows, int64_t column, int64_t width,
                          int64_t index) {
    for (int64_t row = 0; row < rows; ++row) {
      const Place place = grid.at(first + row);
      for (int64_t h = 0; h < width && column + h < weight.columns(); h += kLanes) {
        Vec<float> y[F::m][F::m];
        outputs_of<F>(y, products + row * width + h, products_step);
        finish(row, place, y, column + h, int(std::min<int64_t>(kLanes, weight.columns() - column - h)), index);
      }
    }
  };

  if (plan.few) {
    constexpr int64_t kChunk = 64;  // terms of a panel whose points are made in one go
    const Scratch<float> values(kPoints * values_step);
    parallel_for(0, grid.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) transform(values.get(), 0, tile);
    });
    parallel_for(0, (columns + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
      const int64_t made_step = apart(kChunk * kPanel);
      const Scratch<float> products(kPoints * products_step), made(panels ? 0 : kPoints * made_step);
      for (int64_t column = begin * kPanel; column < std::min(end * kPanel, columns); column += kPanel) {
        const int64_t width = panel_width(column, columns);
        if (panels) {
          multiply(products.get(), values.get(), panels + layout.at(column), layout.step(), terms, grid.count, column,
                   column + width, 0, terms, [](int) {});
        } else {
          for (int64_t term = 0; term < terms; term += kChunk) {
            const int64_t last = std::min(terms, term + kChunk);
            pack_panel<F>(made.get(), made_step, weight, column, width, term, last);
            multiply(products.get(), values.get(), made.get(), made_step, last - term, grid.count, column,
                     column + width, term, last, [](int) {});
          }
        }
        output(products.get(), 0, grid.count, column, width, 0);
      }
    });
    return;
  }

  const Scratch<float> packed(panels ? 0 : kPoints * layout.step());
  if (!panels) pack_weight<F>(packed.get(), weight);
  const float* const all = panels ? panels : packed.get();
  parallel_for(0, plan.blocks.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> values(kPoints * values_step), products(kPoints * products_step);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * block, rows = std::min(block, grid.count - first);
      for (int64_t tile = first; tile < first + rows; ++tile) transform(values.get(), first, tile);
      for (int64_t from = 0; from < columns; from += plan.group) {
        const int64_t to = std::min(columns, from + plan.group);
        multiply(products.get(), values.get(), all + layout.at(from), layout.step(), terms, rows, from, to, 0, terms,
                 [&](int point) {
                   prefetch_tiles<false>(Touched<T>{x, weight.terms(), weight.terms(), 1}, grid, first + rows,
                                         first + rows + block, point, kPoints);
                   prefetch_outputs(first, first + rows, point, kPoints);
                 });
        for (int64_t column = from; column < to; column += kPanel)
          output(products.get() + (column - from) * block, first, rows, column, panel_width(column, columns), index);
      }
    }
  });
}

}  // namespace ran::cpu::RAN_ISA
