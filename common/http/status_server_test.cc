#include "common/http/status_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/http/status_page.h"
#include "common/rpc/address.h"
#include "google/protobuf/util/json_util.h"
#include "gtest/gtest.h"
#include "httplib.h"

namespace codistill {
namespace {

DaemonStatus Status() {
  DaemonStatus status;
  status.set_kind("parameter_server");
  status.set_job("<mnist>");
  status.set_group("north");
  status.set_index(2);
  status.set_state("training");
  status.set_detail("waiting for \"rank 3\" & others");
  status.set_step(1234567);
  status.mutable_group_state()->set_phase(GroupState::TRAINING);
  status.mutable_group_state()->mutable_version()->set_generation(2);
  status.mutable_group_state()->mutable_version()->set_step(41);
  MemberStatus* member = status.add_members();
  member->set_state("<script>alert(1)</script>");
  member->mutable_counters()->set_steps(17);
  EvaluationResult* result = status.mutable_history()->add_evaluations();
  result->set_loss(0.25);
  result->set_accuracy(0.96875);
  ShardLoad* shard = status.add_shards();
  shard->set_weight_bytes(4194304);
  shard->set_pushes(271828);
  shard->add_tables()->set_name("ads<1>");
  shard->mutable_tables(0)->set_evicted(31337);
  ServedModelStatus* model = status.add_models();
  model->set_model("south");
  model->set_precision("BF16");
  model->set_refused(60221);
  model->set_batches(4);
  model->set_examples(50);
  model->set_cache_hits(91093);
  model->set_last_load_error("tensor <w> has a NaN");
  return status;
}

TEST(StatusPageTest, ShowsEverythingEscaped) {
  const std::string html = RenderStatusPage(Status());
  for (const char* want :
       {"<title>parameter_server north/2</title>", "&lt;mnist&gt;",
        "waiting for &quot;rank 3&quot; &amp; others", "<td class=\"n\">1234567</td>", "TRAINING",
        "<td>2.41</td>", "&lt;script&gt;alert(1)&lt;/script&gt;", "0.9688", "south", "4194304",
        "271828", "BF16", "60221", ">12.5<", "91093", "tensor &lt;w&gt; has a NaN", "ads&lt;1&gt;",
        "31337"}) {
    EXPECT_NE(html.find(want), std::string::npos) << want;
  }
  EXPECT_EQ(html.find("<script>"), std::string::npos);
  EXPECT_EQ(EscapeHtml("a'b"), "a&#39;b");
}

TEST(StatusPageTest, JsonIsTheMessage) {
  DaemonStatus parsed;
  ASSERT_TRUE(
      google::protobuf::util::JsonStringToMessage(RenderStatusJson(Status()), &parsed).ok());
  EXPECT_EQ(parsed.SerializeAsString(), Status().SerializeAsString());
  EXPECT_NE(RenderStatusJson(Status()).find("\"uptime_seconds\": 0"), std::string::npos);
}

class StatusServerTest : public testing::Test {
 protected:
  StatusServer::Options Options() {
    StatusServer::Options options;
    options.status = Status;
    options.ready = [this] { return ready_.load(); };
    options.metrics = [] { return std::string("codistill_step 3\n"); };
    return options;
  }
  void SetUp() override {
    auto server = StatusServer::Start(Options());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    port_ = ParseHostPort(server_->address())->port;
    ASSERT_GT(port_, 0);
  }
  httplib::Result Get(const std::string& path) {
    return httplib::Client("127.0.0.1", port_).Get(path.c_str());
  }

  std::atomic<bool> ready_{true};
  std::unique_ptr<StatusServer> server_;
  int port_ = 0;
};

TEST_F(StatusServerTest, ServesItsPages) {
  auto page = Get("/statusz");
  ASSERT_TRUE(page);
  EXPECT_EQ(page->status, 200);
  EXPECT_EQ(page->body, RenderStatusPage(Status()));
  EXPECT_EQ(page->get_header_value("Content-Type"), "text/html; charset=utf-8");

  auto json = Get("/statusz?json");
  ASSERT_TRUE(json);
  EXPECT_EQ(json->body, RenderStatusJson(Status()));
  EXPECT_EQ(json->get_header_value("Content-Type"), "application/json");

  auto metrics = Get("/metrics");
  ASSERT_TRUE(metrics);
  EXPECT_EQ(metrics->body, "codistill_step 3\n");
  EXPECT_EQ(metrics->get_header_value("Content-Type"), "text/plain; version=0.0.4");

  EXPECT_EQ(Get("/healthz")->status, 200);
  EXPECT_EQ(Get("/nothing")->status, 404);
  EXPECT_EQ(httplib::Client("127.0.0.1", port_).Post("/statusz")->status, 404);
}

TEST_F(StatusServerTest, ReadinessFollows) {
  EXPECT_EQ(Get("/readyz")->status, 200);
  ready_ = false;
  auto result = Get("/readyz");
  EXPECT_EQ(result->status, 503);
  EXPECT_EQ(result->body, "not ready\n");
}

TEST_F(StatusServerTest, ManyClients) {
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        auto result = Get("/statusz");
        if (result && result->status == 200) ++good;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 160);
}

// Connections that never ask for anything hold the server up for no longer than its timeout.
TEST_F(StatusServerTest, SilentConnectionsEnd) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port_);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::vector<int> sockets;
  for (int i = 0; i < 3; ++i) {
    sockets.push_back(socket(AF_INET, SOCK_STREAM, 0));
    ASSERT_EQ(connect(sockets.back(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  httplib::Client client("127.0.0.1", port_);
  client.set_read_timeout(60);
  auto result = client.Get("/healthz");
  ASSERT_TRUE(result);
  EXPECT_EQ(result->status, 200);
  const absl::Time start = absl::Now();
  server_->Stop();
  server_->Stop();
  EXPECT_LT(absl::Now() - start, absl::Seconds(15));
  for (int fd : sockets) close(fd);
  EXPECT_FALSE(Get("/healthz"));
}

TEST_F(StatusServerTest, PortInUseAndForeignAddressesAreNamed) {
  StatusServer::Options options = Options();
  options.address = server_->address();
  absl::Status status = StatusServer::Start(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_NE(status.message().find(server_->address()), std::string::npos) << status;
  options.address = "0.0.0.0:0";
  status = StatusServer::Start(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
  options.insecure_listen = true;
  EXPECT_TRUE(StatusServer::Start(options).ok());
}

}  // namespace
}  // namespace codistill
