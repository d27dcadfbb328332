// The next token of a row of logits; the fast twin of roost_engine/sampling.py, which has the
// formula and its sources.
//
// Why it is fast: Gumbel noise above 7.6 needs the top 11 bits of the random number to be ones. A
// token more than 8 below the best so far can be dismissed by looking at those bits, without
// logarithms; of 49,000 tokens some hundred remain.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace roost {

struct SamplingRow {
  uint64_t seed, position;
  double temperature;  // 0: the most likely token
  double top_p;        // 1: all
  double min_p;        // 0: all
  int64_t top_k;       // 0: all
};

constexpr int kNotANumber = -1;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

ROOST_INLINE uint64_t mix(uint64_t state) {
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EB;
  return state ^ (state >> 31);
}

ROOST_INLINE double gumbel(uint64_t bits) {
  const double uniform = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
  return -std::log(-std::log(uniform));
}

// Index of the largest logit, the lowest of equals; kNotANumber if the largest is not finite.
inline int most_likely(const float* logits, int size) {
  Floats most = splat(-INFINITY), poison = splat(0.f);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats row = load(logits + i);
    most = larger(most, row);
    poison = add(poison, mul(row, splat(0.f)));  // NaN of NaN and of infinity
  }
  float top = largest(most);
  bool has_infinity = !(sum(poison) == 0.f);
  for (; i < size; i++) {
    top = std::max(top, logits[i]);
    has_infinity |= !(logits[i] * 0.f == 0.f);
  }
  if (has_infinity) {  // -inf forbids a token and is fine, NaN and +inf are not
    top = -INFINITY;
    for (i = 0; i < size; i++) {
      if (std::isnan(logits[i])) return kNotANumber;
      top = std::max(top, logits[i]);
    }
  }
  if (std::isinf(top)) return kNotANumber;
  return static_cast<int>(std::find(logits, logits + size, top) - logits);
}

class Sampler {
 public:
  int sample(const float* logits, int size, const SamplingRow& row) {
    const int best = most_likely(logits, size);
    if (best == kNotANumber || row.temperature == 0.0) return best;
    logits_ = logits;
    size_ = size;
    top_ = logits[best];
    temperature_ = row.temperature;
    key_ = mix(mix(row.seed) + row.position);
    const bool limits_k = row.top_k > 0 && row.top_k < size;
    if (!limits_k && row.top_p >= 1.0 && row.min_p <= 0.0) return draw_from_all();
    allow(limits_k ? row.top_k : size, row.top_p, row.min_p);
    return draw_from_allowed();
  }

 private:
  static constexpr double kAll = 1e300;

  struct Candidate {
    double scaled;
    int id;
  };

  // Logit over temperature, the largest being 0.
  double scaled(int id) const {
    return (static_cast<double>(logits_[id]) - top_) / temperature_;
  }

  uint64_t bits(int id) const { return mix(key_ + (static_cast<uint64_t>(id) + 1) * kGolden); }

  int draw_from_all() const {
    double best = -INFINITY;
    int winner = 0;
    for (int id = 0; id < size_; id++) {
      const double value = scaled(id);
      const uint64_t random = bits(id);
      if (best - value > 8.0 && (random >> 53) != 0x7ff) continue;
      const double perturbed = value + gumbel(random);
      if (perturbed > best) {
        best = perturbed;
        winner = id;
      }
    }
    return winner;
  }

  int draw_from_allowed() const {
    double best = -INFINITY;
    int winner = allowed_.front().id;
    for (const Candidate& each : allowed_) {
      const double perturbed = each.scaled + gumbel(bits(each.id));
      if (perturbed > best || (perturbed == best && each.id < winner)) {
        best = perturbed;
        winner = each.id;
      }
    }
    return winner;
  }

  // What min-p, then top-k, then top-p leave; at least the most likely token. Only tokens within
  // `reach` of it are looked at; where that proves too few, further ones are. Beyond 1000 they
  // weigh nothing, so then all are: a row whose other tokens are forbidden never has enough.
  void allow(int64_t top_k, double top_p, double min_p) {
    const bool limits_k = top_k < size_;
    double reach = min_p > 0.0 ? -std::log(min_p) : 16.0;
    while (!try_allow(reach, limits_k ? top_k : size_, limits_k, top_p, min_p > 0.0))
      reach = reach < 1000.0 ? reach * 4 : kAll;
  }

  // False if tokens beyond `reach` would have to be seen; `is_exact`: there are none to be.
  bool try_allow(double reach, int64_t top_k, bool limits_k, double top_p, bool is_exact) {
    gather(reach);
    const auto count = [this] { return static_cast<int64_t>(allowed_.size()); };
    const bool is_complete = is_exact || reach >= kAll || count() == size_;
    if (limits_k && count() < top_k && !is_complete) return false;
    const auto likelier = [](const Candidate& a, const Candidate& b) {
      return a.scaled > b.scaled || (a.scaled == b.scaled && a.id < b.id);
    };
    if (count() > top_k) {
      std::nth_element(allowed_.begin(), allowed_.begin() + top_k, allowed_.end(), likelier);
      allowed_.resize(top_k);
    }
    if (top_p >= 1.0) return limits_k || is_complete;
    const double total = limits_k || is_complete ? weight_of_allowed() : weight_of_all();
    std::sort(allowed_.begin(), allowed_.end(), likelier);
    double reached = 0;
    size_t kept = 0;
    while (kept < allowed_.size() && reached < top_p * total)
      reached += std::exp(allowed_[kept++].scaled);
    if (reached < top_p * total && !limits_k && !is_complete) return false;
    allowed_.resize(std::max<size_t>(kept, 1));
    return true;
  }

  void gather(double reach) {
    allowed_.clear();
    for (int id = 0; id < size_; id++) {
      const double value = scaled(id);
      if (value >= -reach) allowed_.push_back({value, id});
    }
  }

  double weight_of_allowed() const {
    double total = 0;
    for (const Candidate& each : allowed_) total += std::exp(each.scaled);
    return total;
  }

  double weight_of_all() const {
    double total = 0;
    const Floats top = splat(top_), inverse = splat(static_cast<float>(1.0 / temperature_));
    int id = 0;
    for (; id + kLanes <= size_; id += kLanes) {
      const Floats weights = exponential(mul(sub(load(logits_ + id), top), inverse));
      total += sum(weights);
    }
    for (; id < size_; id++) total += std::exp(scaled(id));
    return total;
  }

  const float* logits_ = nullptr;
  int size_ = 0;
  float top_ = 0;
  double temperature_ = 1;
  uint64_t key_ = 0;
  std::vector<Candidate> allowed_;
};

}  // namespace roost
