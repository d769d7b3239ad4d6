// All third-party libraries that a daemon may use, in one process: they link together, and each
// does one small thing right. What this guards against is a build that mixes two copies or two ABIs
// of one library, which shows only when they meet.

#include <glog/logging.h>
#include <google/protobuf/text_format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <hwy/targets.h>
#include <png.h>
#include <prometheus/counter.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <turbojpeg.h>
#include <zlib.h>

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/random/random.h"
#include "absl/status/statusor.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "httplib.h"
#include "proto/control.grpc.pb.h"
#include "proto/job.pb.h"
#include "tests/build_smoke/torch_side.h"

namespace codistill {
namespace {

TEST(LibrariesTest, Torch) {
  EXPECT_FLOAT_EQ(GradientOfSquare(3.0f), 6.0f);
  EXPECT_EQ(LargestBlasError(256), 0.0);
}

TEST(LibrariesTest, Protobuf) {
  JobConfig job;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString("name: 'a' seed: 7", &job));
  EXPECT_EQ(job.seed(), 7u);
}

class StatusOnly : public Control::Service {
  grpc::Status GetStatus(grpc::ServerContext*, const GetStatusRequest*,
                         DaemonStatus* reply) override {
    reply->set_state("serving");
    return grpc::Status::OK;
  }
};

TEST(LibrariesTest, GrpcWithHealthAndReflection) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  StatusOnly service;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  ASSERT_NE(server, nullptr);
  ASSERT_NE(server->GetHealthCheckService(), nullptr);

  std::unique_ptr<Control::Stub> stub = Control::NewStub(grpc::CreateChannel(
      absl::StrFormat("127.0.0.1:%d", port), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  DaemonStatus reply;
  grpc::Status status = stub->GetStatus(&context, GetStatusRequest(), &reply);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(reply.state(), "serving");
  server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(5));
}

TEST(LibrariesTest, Abseil) {
  absl::flat_hash_map<std::string, int> map = {{"a", 1}};
  absl::Mutex mutex;
  absl::MutexLock lock(&mutex);
  absl::BitGen generator;
  EXPECT_LT(absl::Uniform(generator, 0, 10), 10);
  EXPECT_EQ(absl::Cord("text"), "text");
  EXPECT_GT(absl::Now(), absl::UnixEpoch());
  EXPECT_EQ(map.at("a"), 1);
  absl::StatusOr<int> missing = absl::NotFoundError("gone");
  EXPECT_EQ(missing.status().message(), "gone");
}

TEST(LibrariesTest, PrometheusTextFormat) {
  prometheus::Registry registry;
  prometheus::BuildCounter().Name("steps_total").Register(registry).Add({}).Increment(3);
  EXPECT_NE(prometheus::TextSerializer().Serialize(registry.Collect()).find("steps_total 3"),
            std::string::npos);
}

TEST(LibrariesTest, HttpRoundTrip) {
  httplib::Server server;
  server.Get("/", [](const httplib::Request&, httplib::Response& response) {
    response.set_content("hello", "text/plain");
  });
  int port = server.bind_to_any_port("127.0.0.1");
  ASSERT_GT(port, 0);
  std::thread thread([&] { server.listen_after_bind(); });
  httplib::Result result = httplib::Client("127.0.0.1", port).Get("/");
  server.stop();
  thread.join();
  ASSERT_TRUE(result) << httplib::to_string(result.error());
  EXPECT_EQ(result->body, "hello");
}

TEST(LibrariesTest, Json) { EXPECT_EQ(nlohmann::json::parse("{\"a\": [1, 2]}")["a"][1], 2); }

TEST(LibrariesTest, Compression) {
  std::vector<Bytef> packed(compressBound(1000));
  uLongf packed_size = packed.size();
  const std::string text(1000, 'x');
  ASSERT_EQ(compress(packed.data(), &packed_size, reinterpret_cast<const Bytef*>(text.data()),
                     text.size()),
            Z_OK);
  EXPECT_LT(packed_size, 100u);
}

TEST(LibrariesTest, Images) {
  tjhandle decoder = tjInitDecompress();
  EXPECT_NE(decoder, nullptr);
  tjDestroy(decoder);
  EXPECT_EQ(png_access_version_number(), static_cast<png_uint_32>(PNG_LIBPNG_VER));
}

TEST(LibrariesTest, HighwayHasATarget) { EXPECT_NE(hwy::SupportedTargets(), 0); }

TEST(LibrariesTest, GlogCheckPasses) { CHECK_EQ(1, 1); }

}  // namespace
}  // namespace codistill
