#include "measured.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace ran {
namespace {

struct Hash {
  size_t operator()(const PassShape& shape) const {
    uint64_t hash = uint64_t(shape.pass) * 31 + uint64_t(shape.dtype) * 7 + uint64_t(shape.threads);
    for (const int64_t size : shape.sizes) hash = (hash ^ uint64_t(size)) * 0x9E3779B97F4A7C15u;
    return size_t(hash ^ hash >> 32);
  }
};

int64_t pixels(const PassShape& shape) { return shape.sizes[0] * shape.sizes[1] * shape.sizes[2]; }

// Of any batch, height and width.
PassShape at_any_size(PassShape shape) {
  shape.sizes[0] = shape.sizes[1] = shape.sizes[2] = 0;
  return shape;
}

// What was measured on one device.
struct Table {
  std::unordered_map<PassShape, Times, Hash> tuned;
  std::unordered_map<PassShape, std::vector<Measurement>, Hash> shipped;
};

struct State {
  std::shared_mutex mutex;  // of all that follow
  std::unordered_map<int64_t, Table> tables;
  std::function<void(int64_t)> load;
  Tune tune;
  std::unordered_map<PassShape, Asking, Hash> recorded;
  std::atomic<bool> records{false};
};

State& state() {
  static State* const only = new State;  // never destroyed: threads may outlive static objects
  return *only;
}

thread_local std::optional<Path> tried;

// The path of the least time, or the rule's, where that takes no longer than the noise of a measurement.
std::optional<Path> fastest(const Times& times, Paths allowed, Path rule) {
  std::optional<Path> best;
  for (int i = 0; i < int(times.size()); ++i)
    if (times[i] > 0 && allowed.has(Path(i)) && (!best || times[i] < times[int(*best)])) best = Path(i);
  constexpr double kNoise = 1.03;
  const double by_rule = times[int(rule)];
  return best && by_rule > 0 && by_rule <= kNoise * times[int(*best)] ? rule : best;
}

// How many times more or fewer pixels, as a logarithm.
double distance(const PassShape& a, const PassShape& b) {
  return std::abs(std::log(double(pixels(a)) / double(pixels(b))));
}

std::optional<Choice> find(const Table& table, const PassShape& shape, Paths allowed, Path rule) {
  if (const auto it = table.tuned.find(shape); it != table.tuned.end())
    if (const auto path = fastest(it->second, allowed, rule)) return Choice{*path, Source::tuned};
  if (table.shipped.empty()) return std::nullopt;
  const auto it = table.shipped.find(at_any_size(shape));
  if (it == table.shipped.end()) return std::nullopt;
  const Measurement* nearest = nullptr;
  for (const Measurement& one : it->second)
    if (!nearest || distance(one.shape, shape) < distance(nearest->shape, shape)) nearest = &one;
  if (const auto path = fastest(nearest->times, allowed, rule)) return Choice{*path, Source::shipped};
  return std::nullopt;
}

// A table is loaded at the device's first choice.
std::optional<Choice> find_loaded(const PassShape& shape, Paths allowed, Path rule) {
  std::function<void(int64_t)> load;
  {
    const std::shared_lock lock(state().mutex);
    const auto it = state().tables.find(shape.device);
    if (it != state().tables.end()) return find(it->second, shape, allowed, rule);
    load = state().load;
  }
  if (load) load(shape.device);  // without the lock: it runs Python
  const std::unique_lock lock(state().mutex);
  return find(state().tables[shape.device], shape, allowed, rule);
}

// What tunes a shape, where it was not tuned, with or without success.
Tune tuner_of_unknown(const PassShape& shape) {
  const std::shared_lock lock(state().mutex);
  const auto table = state().tables.find(shape.device);
  const bool known = table != state().tables.end() && table->second.tuned.count(shape);
  return known ? Tune() : state().tune;
}

}  // namespace

void set_measured(int64_t device, const std::vector<Measurement>& tuned, const std::vector<Measurement>& shipped) {
  Table table;
  for (const Measurement& one : tuned) table.tuned[one.shape] = one.times;
  for (const Measurement& one : shipped) table.shipped[at_any_size(one.shape)].push_back(one);
  const std::unique_lock lock(state().mutex);
  state().tables[device] = std::move(table);
}

void set_measuring(std::function<void(int64_t)> load, Tune tune) {
  const std::unique_lock lock(state().mutex);
  state().load = std::move(load);
  state().tune = std::move(tune);
}

Choice choose_measured(const PassShape& shape, Paths allowed, Path rule, bool tunes_now) {
  if (allowed.one_at_most()) return {rule, Source::only};
  if (tried && allowed.has(*tried)) return {*tried, Source::tried};
  if (state().records) {
    const std::unique_lock lock(state().mutex);
    state().recorded[shape] = {shape, allowed, rule};
  }
  auto found = find_loaded(shape, allowed, rule);
  if (const Tune tune = tunes_now && !tried && !state().records ? tuner_of_unknown(shape) : Tune()) {
    tune(shape, allowed, rule);
    found = find_loaded(shape, allowed, rule);
  }
  return found.value_or(Choice{rule, Source::rule});
}

void try_path(std::optional<Path> path) { tried = path; }

void record_shapes(bool on) {
  const std::unique_lock lock(state().mutex);
  if (on) state().recorded.clear();
  state().records = on;
}

std::vector<Asking> recorded_shapes() {
  const std::shared_lock lock(state().mutex);
  std::vector<Asking> found;
  for (const auto& [shape, asking] : state().recorded) found.push_back(asking);
  return found;
}

}  // namespace ran
