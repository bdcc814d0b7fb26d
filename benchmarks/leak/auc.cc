#include "benchmarks/leak/auc.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace spillway::bench {
namespace {

// Ranks from 1, ties share the middle.
std::vector<double> midranks(const std::vector<double>& v) {
  std::vector<size_t> order(v.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return v[a] < v[b]; });
  std::vector<double> rank(v.size());
  for (size_t a = 0; a < order.size();) {
    size_t b = a;
    while (b < order.size() && v[order[b]] == v[order[a]]) ++b;
    for (size_t k = a; k < b; ++k) rank[order[k]] = 0.5 * static_cast<double>(a + b + 1);
    a = b;
  }
  return rank;
}

double variance_of_mean(const std::vector<double>& v) {
  if (v.size() < 2) return 0;
  const auto n = static_cast<double>(v.size());
  const double mean = std::accumulate(v.begin(), v.end(), 0.0) / n;
  double sum = 0;
  for (double x : v) sum += (x - mean) * (x - mean);
  return sum / (n - 1) / n;
}

// Acklam's rational approximation, the central part and the tails; error below 1.2e-9.
double normal_quantile(double p) {
  static constexpr double a[] = {-39.69683028665376, 220.9460984245205,  -275.9285104469687,
                                 138.3577518672690,  -30.66479806614716, 2.506628277459239};
  static constexpr double b[] = {-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972,
                                 -13.28068155288572};
  static constexpr double c[] = {-0.007784894002430293, -0.3223964580411365, -2.400758277161838,
                                 -2.549732539343734,    4.374664141464968,   2.938163982698783};
  static constexpr double d[] = {0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416};
  if (p < 0.02425) {
    const double q = std::sqrt(-2 * std::log(p));
    return (((((c[0] * q + c[1]) * q + c[2]) * q + c[3]) * q + c[4]) * q + c[5]) /
           ((((d[0] * q + d[1]) * q + d[2]) * q + d[3]) * q + 1);
  }
  if (p > 1 - 0.02425) return -normal_quantile(1 - p);
  const double q = p - 0.5, r = q * q;
  return (((((a[0] * r + a[1]) * r + a[2]) * r + a[3]) * r + a[4]) * r + a[5]) * q /
         (((((b[0] * r + b[1]) * r + b[2]) * r + b[3]) * r + b[4]) * r + 1);
}

}  // namespace

Auc auc(const std::vector<double>& score, const std::vector<bool>& label) {
  std::vector<double> yes, no;
  for (size_t i = 0; i < score.size(); ++i) (label[i] ? yes : no).push_back(score[i]);
  if (yes.empty() || no.empty()) return {};
  const std::vector<double> all = midranks(score), among_yes = midranks(yes), among_no = midranks(no);
  const auto m = static_cast<double>(yes.size()), n = static_cast<double>(no.size());
  // How far each score stands above the other kind's: its rank among all without its rank among its own kind.
  std::vector<double> v10, v01;
  double sum = 0;
  size_t y = 0, x = 0;
  for (size_t i = 0; i < score.size(); ++i) {
    if (label[i]) {
      v10.push_back((all[i] - among_yes[y++]) / n);
      sum += v10.back();
    } else {
      v01.push_back(1 - (all[i] - among_no[x++]) / m);
    }
  }
  return {sum / m, variance_of_mean(v10) + variance_of_mean(v01)};
}

Pooled pool(const std::vector<Auc>& runs, double z) {
  if (runs.empty()) return {};
  double sum = 0, variance = 0;
  for (const Auc& a : runs) sum += a.value, variance += a.variance;
  const auto n = static_cast<double>(runs.size());
  return {sum / n, z * std::sqrt(variance) / n};
}

std::vector<double> normal_scores(const std::vector<double>& v) {
  std::vector<double> r = midranks(v);
  for (double& x : r) x = normal_quantile((x - 0.5) / static_cast<double>(v.size()));
  return r;
}

void Classifier::train(const std::vector<std::vector<double>>& rows, const std::vector<bool>& label) {
  constexpr int kSteps = 300;
  constexpr double kRate = 0.5, kL2 = 1e-3;
  if (rows.empty()) return;
  const size_t k = rows[0].size();
  weight_.assign(k + 1, 0);
  std::vector<double> gradient(k + 1);
  for (int step = 0; step < kSteps; ++step) {
    std::fill(gradient.begin(), gradient.end(), 0);
    for (size_t i = 0; i < rows.size(); ++i) {
      const double miss = (label[i] ? 1.0 : 0.0) - 1 / (1 + std::exp(-score(rows[i])));
      for (size_t j = 0; j < k; ++j) gradient[j] += miss * rows[i][j];
      gradient[k] += miss;
    }
    for (size_t j = 0; j <= k; ++j)
      weight_[j] += kRate * (gradient[j] / static_cast<double>(rows.size()) - kL2 * weight_[j]);
  }
}

double Classifier::score(const std::vector<double>& row) const {
  double s = weight_.back();
  for (size_t j = 0; j < row.size(); ++j) s += weight_[j] * row[j];
  return s;
}

}  // namespace spillway::bench
