#include "common/base/fault.h"

#include <signal.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/base/random.h"

namespace codistill {
namespace {

bool Matches(absl::string_view pattern, absl::string_view point) {
  if (absl::ConsumeSuffix(&pattern, "*")) return absl::StartsWith(point, pattern);
  return pattern == point;
}

absl::Status Check(size_t index, const FaultRule& rule) {
  const auto invalid = [&](absl::string_view what) {
    return absl::InvalidArgumentError(
        absl::StrCat("rules[", index, "] (point \"", rule.point, "\"): ", what));
  };
  if (rule.point.empty()) return invalid("point is empty; \"*\" means all");
  if (!(rule.probability >= 0 && rule.probability <= 1)) {
    return invalid(absl::StrCat("probability ", rule.probability, " is not within [0, 1]"));
  }
  if (rule.after < 0 || rule.times < 0) return invalid("after and times must not be negative");
  if (rule.delay < absl::ZeroDuration() || rule.delay > absl::Minutes(1)) {
    return invalid("the delay must be from 0 to 60 s");
  }
  return absl::OkStatus();
}

}  // namespace

FaultInjector& FaultInjector::Global() {
  static FaultInjector* const injector = new FaultInjector;
  return *injector;
}

absl::Status FaultInjector::SetRules(uint64_t seed, std::vector<FaultRule> rules) {
  if (!enabled()) {
    return absl::FailedPreconditionError(
        "faults are switched off in this process; start it with --allow_fault_injection");
  }
  for (size_t i = 0; i < rules.size(); ++i) {
    if (absl::Status status = Check(i, rules[i]); !status.ok()) return status;
  }
  MutexLock lock(&mu_);
  seed_ = seed;
  rules_.clear();
  for (FaultRule& rule : rules) rules_.push_back({std::move(rule), 0, 0});
  return absl::OkStatus();
}

FaultVerdict FaultInjector::Hit(absl::string_view point) {
  FaultVerdict verdict;
  if (!enabled()) return verdict;
  MutexLock lock(&mu_);
  for (size_t i = 0; i < rules_.size(); ++i) {
    Count& count = rules_[i];
    if (!Matches(count.rule.point, point)) continue;
    const int64_t number = count.hits++;
    if (number < count.rule.after) continue;
    if (count.rule.times > 0 && count.faults >= count.rule.times) continue;
    const uint64_t drawn = Mix(seed_, i, static_cast<uint64_t>(number));
    if (UniformDouble(drawn) >= count.rule.probability) continue;
    ++count.faults;
    verdict.random = Mix(drawn);
    switch (count.rule.kind) {
      case FaultKind::kDrop:
        verdict.drop = true;
        break;
      case FaultKind::kDropReply:
        verdict.drop_reply = true;
        break;
      case FaultKind::kDelay:
        verdict.delay += count.rule.delay;
        break;
      case FaultKind::kDuplicate:
        verdict.duplicate = true;
        break;
      case FaultKind::kReorder:
        verdict.reorder = true;
        verdict.hold = count.rule.delay;
        break;
      case FaultKind::kKill:
        verdict.kill = true;
        break;
    }
  }
  return verdict;
}

std::vector<FaultInjector::Count> FaultInjector::counts() const {
  MutexLock lock(&mu_);
  return rules_;
}

namespace internal {

void HitFaultPoint(absl::string_view point) {
  const FaultVerdict verdict = FaultInjector::Global().Hit(point);
  if (verdict.delay > absl::ZeroDuration()) absl::SleepFor(verdict.delay);
  // As the kernel's out-of-memory killer does it: nothing is flushed, nobody is told.
  if (verdict.kill) kill(getpid(), SIGKILL);
}

}  // namespace internal
}  // namespace codistill
