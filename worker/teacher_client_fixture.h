#ifndef CODISTILL_WORKER_TEACHER_CLIENT_FIXTURE_H_
#define CODISTILL_WORKER_TEACHER_CLIENT_FIXTURE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "worker/teacher_batch_fixture.h"
#include "worker/teacher_client.h"
#include "worker/testing/scripted_inference_server.h"

// What the tests of the teacher client share: a model of one input "x" FLOAT [1] with three
// outputs, batches of two rows, and teachers that answer as a test says.
namespace codistill {

inline bool Eventually(const std::function<bool()>& condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

inline std::vector<float> Values(const Tensor& tensor) {
  auto values = tensor.As<float>();
  return {values.begin(), values.end()};
}

// Logits whose every value is `value`.
inline void AddLogits(float value, inference::ModelInferResponse* response) {
  AddFp32Output("logits", {kRows, kOutputs}, std::vector<float>(kRows * kOutputs, value), response);
}

class TeacherClientTest : public ::testing::Test {
 protected:
  TeacherClientTest() {
    options_.model.set_num_outputs(kOutputs);
    auto* input = options_.model.add_inputs();
    input->set_name("x");
    input->add_shape(1);
    options_.codistillation.set_max_staleness_steps(10);
  }

  std::unique_ptr<ScriptedInferenceServer> AddTeacher(const std::string& name,
                                                      ScriptedInferenceServer::Answer answer) {
    auto server = ScriptedInferenceServer::Start(std::move(answer));
    options_.teachers.push_back({name, {server->address()}, {}});
    return server;
  }
  // One more server of the teacher that was added last.
  std::unique_ptr<ScriptedInferenceServer> AddServer(ScriptedInferenceServer::Answer answer) {
    auto server = ScriptedInferenceServer::Start(std::move(answer));
    options_.teachers.back().addresses.push_back(server->address());
    return server;
  }

  void AddState() {
    auto* state = options_.model.add_states();
    state->set_name("h");
    state->add_shape(1);
    state->add_shape(-1);
  }

  std::unique_ptr<TeacherSource> Create(
      CodistillationConfig::OnTeacherLoss policy = CodistillationConfig::WAIT) {
    options_.codistillation.set_on_teacher_loss(policy);
    auto client = TeacherClient::Create(std::move(options_));
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  TeacherClient::Options options_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_CLIENT_FIXTURE_H_
