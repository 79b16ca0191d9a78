// What the cases of compare_gpu.cpp have in common that normalise: vectors a channel, and the batch's statistics.
#pragma once

#include "compare_run.h"

namespace compare {

// A batch normalisation; of variance 1 where numbers are whole, so that z is whole, too.
struct Norm {
  Array<float> mean, var, weight, bias;
  double eps;
  Norm(const Run& run, size_t channels)
      : mean(run.input<float>(channels, -1, 1)),
        var(run.input<float>(channels, run.whole ? 1 : 0.5, run.whole ? 1 : 2)),
        weight(run.input<float>(channels, -2, 2)),
        bias(run.input<float>(channels, -1, 1)),
        eps(run.whole ? 0 : 1e-5) {}
  ran::BatchNorm<float> get() const { return {mean.data(), var.data(), weight.data(), bias.data(), eps}; }
};

// Mean and variance are the same bit for bit where all weights of a merge are powers of two: `exact`.
struct Statistics {
  Array<float> mean, var, running_mean, running_var;
  Array<int64_t> batches;
  explicit Statistics(size_t channels)
      : mean(channels),
        var(channels),
        running_mean(std::vector<float>(channels, 1)),
        running_var(std::vector<float>(channels, 2)),
        batches(std::vector<int64_t>{3}) {}
  ran::cuda::RunningStatistics running() const {
    return {running_mean.data(), running_var.data(), batches.data(), -1.0f};
  }
  void output(const Run& run, bool exact, double slack) const {
    const Match match = exact ? Match::bits : Match::rounding;
    run.output("mean", mean, match, slack);
    run.output("var", var, match, slack * 8);
    run.output("running_mean", running_mean, match, slack);
    run.output("running_var", running_var, match, slack * 8);
    run.output("batches", batches, match, 0);
  }
};

}  // namespace compare
