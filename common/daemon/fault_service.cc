#include "common/daemon/fault_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/rpc/unary_call.h"
#include "glog/logging.h"
#include "google/protobuf/text_format.h"

namespace codistill {
namespace internal {
namespace {

absl::Status CheckAllowed() {
  if (FaultInjector::Global().enabled()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "faults are switched off in this process; start it with --allow_fault_injection");
}

void FillCounts(InjectFaultsReply* reply) {
  for (const FaultInjector::Count& count : FaultInjector::Global().counts()) {
    InjectFaultsReply::Count* const to = reply->add_counts();
    to->mutable_rule()->set_point(count.rule.point);
    to->mutable_rule()->set_kind(
        static_cast<FaultRuleProto::Kind>(static_cast<int>(count.rule.kind) + 1));
    to->mutable_rule()->set_probability(count.rule.probability);
    to->mutable_rule()->set_after(count.rule.after);
    to->mutable_rule()->set_times(count.rule.times);
    to->mutable_rule()->set_delay_ms(absl::ToDoubleMilliseconds(count.rule.delay));
    to->set_hits(count.hits);
    to->set_faults(count.faults);
  }
}

static_assert(static_cast<int>(FaultKind::kDrop) + 1 == FaultRuleProto::DROP &&
                  static_cast<int>(FaultKind::kKill) + 1 == FaultRuleProto::KILL,
              "the kinds of the proto are those of common/base/fault.h, counted from 1");

absl::Status Inject(const InjectFaultsRequest& request) {
  CODISTILL_ASSIGN_OR_RETURN(std::vector<FaultRule> rules, ToFaultRules(request));
  const size_t count = rules.size();
  CODISTILL_RETURN_IF_ERROR(FaultInjector::Global().SetRules(request.seed(), std::move(rules)));
  LOG(WARNING) << "fault injection: " << count << " rules, seed " << request.seed();
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<FaultRule>> ToFaultRules(const InjectFaultsRequest& request) {
  std::vector<FaultRule> rules;
  for (const FaultRuleProto& from : request.rules()) {
    if (from.kind() < FaultRuleProto::DROP || from.kind() > FaultRuleProto::KILL) {
      return absl::InvalidArgumentError(
          absl::StrCat("rules[", rules.size(), "] (point \"", from.point(),
                       "\"): kind must be one of DROP, DROP_REPLY, DELAY, DUPLICATE, REORDER, "
                       "KILL"));
    }
    FaultRule rule;
    rule.point = from.point();
    rule.kind = static_cast<FaultKind>(from.kind() - 1);
    rule.probability = from.probability() == 0 ? 1 : from.probability();
    rule.after = from.after();
    rule.times = from.times();
    if (from.delay_ms() != 0) rule.delay = absl::Milliseconds(from.delay_ms());
    rules.push_back(std::move(rule));
  }
  return rules;
}

absl::Status EnableFaults(const std::string& plan_file) {
  FaultInjector::Global().Enable();
  if (plan_file.empty()) return absl::OkStatus();
  CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(plan_file, size_t{1} << 20));
  InjectFaultsRequest plan;
  if (!google::protobuf::TextFormat::ParseFromString(text, &plan)) {
    return absl::InvalidArgumentError(
        absl::StrCat(plan_file, ": not the text format of InjectFaultsRequest"));
  }
  return Annotate(Inject(plan), plan_file);
}

grpc::ServerUnaryReactor* FaultService::InjectFaults(grpc::CallbackServerContext* context,
                                                     const InjectFaultsRequest* request,
                                                     InjectFaultsReply* reply) {
  absl::Status status = CheckAllowed();
  if (status.ok()) {
    FillCounts(reply);
    status = Inject(*request);
  }
  return AnswerUnary(context, status);
}

grpc::ServerUnaryReactor* FaultService::GetFaults(grpc::CallbackServerContext* context,
                                                  const GetFaultsRequest*,
                                                  InjectFaultsReply* reply) {
  const absl::Status status = CheckAllowed();
  if (status.ok()) FillCounts(reply);
  return AnswerUnary(context, status);
}

}  // namespace internal
}  // namespace codistill
