// What an attacker's scores are worth: area under the ROC curve with its variance, and a small classifier. Pure, thread-safe.
#pragma once

#include <cstddef>
#include <vector>

namespace spillway::bench {

struct Auc {
  double value = 0.5;     // P(score of a touched block > score of another), ties half
  double variance = 0;    // DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988)
};
// label true = touched. Both kinds must occur, else {0.5, 0}.
Auc auc(const std::vector<double>& score, const std::vector<bool>& label);

// The mean over runs with the half width of its interval; z = 1.96 for 95 %.
struct Pooled {
  double mean = 0.5, half_width = 0.5;
};
Pooled pool(const std::vector<Auc>& runs, double z);

// Scores turned into normal quantiles of their ranks: no outlier counts for more than its rank. Ties share theirs.
std::vector<double> normal_scores(const std::vector<double>& v);

// Logistic regression with a small L2 term, by gradient descent. rows: equal lengths.
class Classifier {
 public:
  void train(const std::vector<std::vector<double>>& rows, const std::vector<bool>& label);
  double score(const std::vector<double>& row) const;

 private:
  std::vector<double> weight_;  // the last one is the constant
};

}  // namespace spillway::bench
