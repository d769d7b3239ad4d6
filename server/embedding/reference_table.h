#ifndef CODISTILL_SERVER_EMBEDDING_REFERENCE_TABLE_H_
#define CODISTILL_SERVER_EMBEDDING_REFERENCE_TABLE_H_

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

#include "common/embedding/default_row.h"
#include "server/embedding/embedding_table.h"
#include "server/embedding/row_optimizer.h"

namespace codistill {

// What EmbeddingTable promises, written down as plainly as possible: a std::map, one key after the
// other, rules applied to everything at every step. For tests.
class ReferenceTable {
 public:
  explicit ReferenceTable(const EmbeddingTable::Options& options)
      : options_(options), optimizer_(options.optimizer, options.dim) {}

  struct Item {
    uint32_t touched = 0;
    int64_t count = 0;        // of a key that waits; 0 once it has a row
    std::vector<float> data;  // weights and slots
  };

  void Apply(const EmbeddingTable::Update& update, const std::vector<uint64_t>& keys,
             const std::vector<float>& gradients) {
    const RowOptimizer::Step step = optimizer_.MakeStep(update.learning_rate, update.step);
    const uint32_t now = static_cast<uint32_t>(update.step);
    DropOld(now);
    for (size_t i = 0; i < keys.size(); ++i) {
      Item* const item = Admit(keys[i], now, step);
      if (item == nullptr) continue;
      changed_[keys[i]] = now;
      item->touched = now;
      float* const row = item->data.data();
      const float* const gradient = gradients.data() + i * options_.dim;
      optimizer_.Apply(step, {row}, {gradient});
    }
    step_ = update.step;
    DropOld(now + 1);
  }

  std::vector<float> Row(uint64_t key) const {
    std::vector<float> row(options_.dim);
    const auto it = items_.find(key);
    if (it != items_.end() && it->second.count == 0) {
      row.assign(it->second.data.begin(), it->second.data.begin() + options_.dim);
    } else {
      DefaultRow(options_.init, key, absl::MakeSpan(row));
    }
    return row;
  }
  bool Has(uint64_t key) const {
    const auto it = items_.find(key);
    return it != items_.end() && it->second.count == 0;
  }

  void Evict(int64_t older_than, float norm_below) {
    for (auto it = items_.begin(); it != items_.end();) {
      const bool old = older_than >= 0 && step_ + 1 - it->second.touched > older_than;
      const bool small = norm_below > 0 && it->second.count == 0 &&
                         Squares(it->second) < static_cast<double>(norm_below) * norm_below;
      it = old || small ? Erase(it) : std::next(it);
    }
  }

  const std::map<uint64_t, Item>& items() const { return items_; }
  // By key: the last step that updated it.
  const std::map<uint64_t, uint32_t>& changed() const { return changed_; }
  int64_t not_admitted = 0;
  int64_t refused = 0;
  int64_t created = 0;
  int64_t forgotten = 0;  // to make room

 private:
  static constexpr uint64_t kWaitingBytes = 24;
  uint64_t RowBytes() const { return optimizer_.row_floats() * 4 + kWaitingBytes; }

  double Squares(const Item& item) const {
    double squares = 0;
    for (int i = 0; i < options_.dim; ++i) {
      squares += static_cast<double>(item.data[i]) * item.data[i];
    }
    return squares;
  }

  bool Dead(const Item& item, uint32_t now) const {
    const int64_t age = static_cast<int64_t>(now) - item.touched;
    if (options_.max_age_steps > 0 && age > options_.max_age_steps) return true;
    return options_.min_norm > 0 && item.count == 0 && age > options_.min_norm_age_steps &&
           Squares(item) < static_cast<double>(options_.min_norm) * options_.min_norm;
  }
  void DropOld(uint32_t now) {
    for (auto it = items_.begin(); it != items_.end();) {
      it = Dead(it->second, now) ? Erase(it) : std::next(it);
    }
  }

  std::map<uint64_t, Item>::iterator Erase(std::map<uint64_t, Item>::iterator it) {
    live_ -= it->second.count > 0 ? kWaitingBytes : RowBytes();
    return items_.erase(it);
  }

  Item* Admit(uint64_t key, uint32_t now, const RowOptimizer::Step& step) {
    auto it = items_.find(key);
    if (it != items_.end() && it->second.count == 0) return &it->second;
    const int64_t seen = 1 + (it == items_.end() ? 0 : it->second.count);
    if (seen < options_.min_count) {
      ++not_admitted;
      if (it != items_.end() || MakeRoom(kWaitingBytes, now)) {
        if (it == items_.end()) live_ += kWaitingBytes;
        Item& item = items_[key];
        item.touched = now;
        item.count = seen;
      }
      return nullptr;
    }
    if (!MakeRoom(RowBytes(), now)) {
      ++refused;
      return nullptr;
    }
    ++created;
    live_ += RowBytes() - (items_.count(key) > 0 ? kWaitingBytes : 0);
    Item& item = items_[key];
    item.touched = now;
    item.count = 0;
    item.data.resize(optimizer_.row_floats());
    DefaultRow(options_.init, key, absl::MakeSpan(item.data.data(), options_.dim));
    optimizer_.InitSlots(step, item.data.data());
    return &item;
  }

  bool MakeRoom(uint64_t bytes, uint32_t now) {
    if (options_.max_bytes == 0) return true;
    if (live_ + bytes <= options_.max_bytes) return true;
    while (live_ > options_.max_bytes - options_.max_bytes / 16 - bytes) {
      uint32_t oldest = now;
      for (const auto& item : items_) oldest = std::min(oldest, item.second.touched);
      if (oldest == now) break;
      for (auto it = items_.begin(); it != items_.end();) {
        if (it->second.touched != oldest) {
          ++it;
          continue;
        }
        ++forgotten;
        it = Erase(it);
      }
    }
    return live_ + bytes <= options_.max_bytes;
  }

  const EmbeddingTable::Options options_;
  const RowOptimizer optimizer_;
  int64_t step_ = 0;
  uint64_t live_ = 0;  // bytes
  std::map<uint64_t, Item> items_;
  std::map<uint64_t, uint32_t> changed_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_REFERENCE_TABLE_H_
