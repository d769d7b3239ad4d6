// What a prediction server makes of its core: its speed beside libtorch's own loop over the same
// archive, what batching wins, how fast large answers leave, what a lone client waits, and what the
// prediction cache and a refusal cost. The server, and libtorch's loop, are on core 0 with one
// compute thread each and take turns; the clients are on core 1. libtorch's loop ("direct") is
// the fastest that libtorch has: of the archive as it is ("forward"), or compiled for inference.
// Every element of every answer is compared with what libtorch says.
//
//   prediction [--quick] [SECTION...]      sections: resnet mlp logits cache refusals threads;
//   default: all
//
// The last line of the output is a JSON object.

#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/deadlock_detection.h"
#include "common/rpc/channel.h"
#include "nlohmann/json.hpp"
#include "proto/open_inference.grpc.pb.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/known_answers_load.h"
#include "tests/benchmarks/prediction_models.h"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;
using Server = MeasuredModel::Server;

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::fprintf(stderr, "prediction: %s\n", value.status().ToString().c_str());
  std::exit(1);
}

void Check(const absl::Status& status) {
  if (!status.ok()) Must<int>(status);
}

struct Plan {
  int rounds = 10;
  double turn_seconds = 1;
  std::string directory;
};

std::vector<double> Scaled(std::vector<double> samples, double by) {
  for (double& sample : samples) sample *= by;
  return samples;
}

Json Spread(const std::vector<double>& samples) {
  return {{"median", Median(samples)},
          {"lowest", *std::min_element(samples.begin(), samples.end())},
          {"highest", *std::max_element(samples.begin(), samples.end())}};
}

// As many as take about the turn's time, for something of which one took `seconds`.
int Count(const Plan& plan, double seconds, int least = 8) {
  return std::max(least, static_cast<int>(plan.turn_seconds / seconds));
}

// Runs `options` once for warmth, then sizes it for a turn.
void Size(const Plan& plan, KnownAnswersLoad* load, KnownAnswersLoad::Options* options) {
  options->requests = 2 * std::max(4, options->in_flight);
  Must(load->Run(*options));
  const KnownAnswersLoad::Result result = Must(load->Run(*options));
  options->requests = Count(plan, result.seconds / options->requests, 2 * options->in_flight);
}

double Rate(KnownAnswersLoad* load, const KnownAnswersLoad::Options& options) {
  const KnownAnswersLoad::Result result = Must(load->Run(options));
  return static_cast<double>(options.requests * options.rows) / result.seconds;
}

double DirectRate(MeasuredModel* model, int64_t rows, int passes) {
  return static_cast<double>(rows * passes) / Must(model->RunDirect(rows, passes)).seconds;
}

double ForwardRate(MeasuredModel* model, int64_t rows, int passes) {
  return static_cast<double>(rows * passes) / Must(model->RunForward(rows, passes)).seconds;
}

int DirectCount(const Plan& plan, MeasuredModel* model, int64_t rows) {
  return Count(plan, Median(Must(model->RunDirect(rows, 5)).passes), 4);
}

std::unique_ptr<MeasuredModel> ResNet20(const Plan& plan) {
  MeasuredModel::Options options;
  options.name = "resnet20";
  options.module = "resnet";
  options.options = {{"depth", "20"}, {"num_classes", "10"}};
  options.input = "image";
  options.shape = {3, 32, 32};
  options.classes = 10;
  return Must(MeasuredModel::Create(options, plan.directory));
}

std::unique_ptr<MeasuredModel> Mlp(const Plan& plan, const std::string& name, int64_t in,
                                   const std::string& hidden, int64_t classes) {
  MeasuredModel::Options options;
  options.name = name;
  options.module = "mlp";
  options.options = {{"in_features", absl::StrCat(in)},
                     {"hidden", hidden},
                     {"num_classes", absl::StrCat(classes)}};
  options.input = "x";
  options.shape = {in};
  options.classes = classes;
  return Must(MeasuredModel::Create(options, plan.directory));
}

// Where a server's requests have spent their time so far, in milliseconds in the mean.
Json ServerTimes(const Server& server) {
  const auto stub =
      inference::GRPCInferenceService::NewStub(MakeChannel(server.address(), ChannelUse::kControl));
  inference::ModelStatisticsResponse response;
  const auto context = MakeContext(absl::Now() + absl::Seconds(10));
  if (!stub->ModelStatistics(context.get(), {}, &response).ok()) return nullptr;
  const auto& statistics = response.model_stats(0).inference_stats();
  const auto mean = [](const inference::StatisticDuration& total) {
    return static_cast<double>(total.ns()) / 1e6 /
           static_cast<double>(std::max<uint64_t>(1, total.count()));
  };
  return {{"success", mean(statistics.success())},
          {"queue", mean(statistics.queue())},
          {"compute_input", mean(statistics.compute_input())},
          {"compute_infer", mean(statistics.compute_infer())},
          {"compute_output", mean(statistics.compute_output())}};
}

// Seconds that a call without content takes: what gRPC, and waking threads, cost alone.
double EmptyCall(const Server& server) {
  const auto stub =
      inference::GRPCInferenceService::NewStub(MakeChannel(server.address(), ChannelUse::kControl));
  std::vector<double> seconds;
  for (int i = 0; i < 200; ++i) {
    const auto context = MakeContext(absl::Now() + absl::Seconds(10));
    inference::ServerLiveResponse response;
    seconds.push_back(Seconds([&] {
      if (!stub->ServerLive(context.get(), {}, &response).ok() || !response.live()) {
        Must<int>(absl::InternalError("the server is not live"));
      }
    }));
  }
  return Median(seconds);
}

// Batches of 64, and a client that is alone with one example at a time.
void MeasureResNet(const Plan& plan, Json* report) {
  const auto model = ResNet20(plan);
  const auto server = Must(model->Serve({}));
  KnownAnswersLoad load(server->address(), 1, &model->known());
  KnownAnswersLoad::Options batches;
  batches.rows = 64;
  batches.in_flight = 2;  // one is there when the other has been answered
  Size(plan, &load, &batches);
  const int passes = DirectCount(plan, model.get(), 64);
  const auto rates =
      Alternate(plan.rounds, {{"server", [&] { return Rate(&load, batches); }},
                              {"direct", [&] { return DirectRate(model.get(), 64, passes); }},
                              {"forward", [&] { return ForwardRate(model.get(), 64, passes); }}});

  // A server of its own, whose statistics are of such requests only.
  const auto lone_server = Must(model->Serve({}));
  KnownAnswersLoad lone(lone_server->address(), 1, &model->known());
  KnownAnswersLoad::Options alone;
  Size(plan, &lone, &alone);
  KnownAnswersLoad::Options awake = alone;
  awake.stay_awake = true;
  const int passes_of_one = DirectCount(plan, model.get(), 1);
  const auto latencies = Alternate(
      plan.rounds,
      {{"server", [&] { return Median(Must(lone.Run(alone)).latencies); }},
       {"server_awake_client", [&] { return Median(Must(lone.Run(awake)).latencies); }},
       {"direct", [&] { return Median(Must(model->RunDirect(1, passes_of_one)).passes); }},
       {"forward", [&] { return Median(Must(model->RunForward(1, passes_of_one)).passes); }},
       {"empty_call", [&] { return EmptyCall(*lone_server); }}});
  const auto added = [&](const char* server, const char* baseline) {
    std::vector<double> ms;
    for (int i = 0; i < plan.rounds; ++i) {
      ms.push_back(1e3 * (latencies.at(server)[i] - latencies.at(baseline)[i]));
    }
    return ms;
  };
  (*report)["throughput_vs_direct"] = MedianRatio(rates.at("server"), rates.at("direct"));
  (*report)["throughput_vs_forward"] = MedianRatio(rates.at("server"), rates.at("forward"));
  (*report)["added_latency_p50_ms"] = Median(added("server", "direct"));
  (*report)["added_latency_awake_client_p50_ms"] = Median(added("server_awake_client", "direct"));
  (*report)["added_latency_vs_forward_p50_ms"] = Median(added("server", "forward"));
  (*report)["resnet20"] = {
      {"shapes", "images 3x32x32, 10 classes, batch 64"},
      {"server_examples_per_second", Spread(rates.at("server"))},
      {"direct_examples_per_second", Spread(rates.at("direct"))},
      {"forward_examples_per_second", Spread(rates.at("forward"))},
      {"server_p50_ms_batch_1", Spread(Scaled(latencies.at("server"), 1e3))},
      {"direct_p50_ms_batch_1", Spread(Scaled(latencies.at("direct"), 1e3))},
      {"forward_p50_ms_batch_1", Spread(Scaled(latencies.at("forward"), 1e3))},
      {"added_ms", Spread(added("server", "direct"))},
      {"added_awake_client_ms", Spread(added("server_awake_client", "direct"))},
      {"added_vs_forward_ms", Spread(added("server", "forward"))},
      {"empty_call_p50_ms", Spread(Scaled(latencies.at("empty_call"), 1e3))},
      {"server_mean_ms_batch_1", ServerTimes(*lone_server)}};
}

// 64 clients with an example each, one client, and what libtorch itself wins from 1 to 64.
void MeasureBatching(const Plan& plan, Json* report) {
  const auto model = Mlp(plan, "mlp", 1024, "4096,4096", 1000);
  const auto server = Must(model->Serve({}));
  constexpr int kClients = 64;
  KnownAnswersLoad one(server->address(), 1, &model->known());
  KnownAnswersLoad many(server->address(), kClients, &model->known());
  KnownAnswersLoad::Options alone, together;
  together.in_flight = kClients;
  Size(plan, &one, &alone);
  Size(plan, &many, &together);
  const int singles = DirectCount(plan, model.get(), 1);
  const int batches = DirectCount(plan, model.get(), kClients);
  const auto rates = Alternate(
      plan.rounds, {{"one", [&] { return Rate(&one, alone); }},
                    {"many", [&] { return Rate(&many, together); }},
                    {"direct_1", [&] { return DirectRate(model.get(), 1, singles); }},
                    {"direct_64", [&] { return DirectRate(model.get(), kClients, batches); }}});
  const double gain = MedianRatio(rates.at("many"), rates.at("one"));
  const double libtorch = MedianRatio(rates.at("direct_64"), rates.at("direct_1"));
  (*report)["batching_gain"] = gain;
  (*report)["libtorch_batching_gain"] = libtorch;
  (*report)["batching_gain_vs_libtorch"] = gain / libtorch;
  (*report)["mlp"] = {{"shapes", "1024-4096-4096-1000, 64 clients of one example each"},
                      {"one_client_examples_per_second", Spread(rates.at("one"))},
                      {"64_clients_examples_per_second", Spread(rates.at("many"))},
                      {"direct_batch_1_examples_per_second", Spread(rates.at("direct_1"))},
                      {"direct_batch_64_examples_per_second", Spread(rates.at("direct_64"))}};
}

// Of this process, all threads.
double OwnProcessorSeconds() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// Answers that are much larger than what is computed for them.
void MeasureLogits(const Plan& plan, Json* report) {
  const auto model = Mlp(plan, "logits", 64, "64", 24000);
  const auto server = Must(model->Serve({}));
  KnownAnswersLoad load(server->address(), 1, &model->known());
  KnownAnswersLoad::Options batches;
  batches.rows = 64;
  batches.in_flight = 4;
  Size(plan, &load, &batches);
  const int passes = DirectCount(plan, model.get(), 64);
  const double bytes = 64.0 * 24000 * sizeof(float);
  std::vector<double> server_share, client_share;  // of their cores
  const auto gbps = Alternate(
      plan.rounds,
      {{"server",
        [&] {
          const double server_before = server->ProcessorSeconds();
          const double client_before = OwnProcessorSeconds();
          const auto result = Must(load.Run(batches));
          server_share.push_back((server->ProcessorSeconds() - server_before) / result.seconds);
          client_share.push_back((OwnProcessorSeconds() - client_before) / result.seconds);
          return static_cast<double>(result.payload_bytes) / result.seconds / 1e9;
        }},
       {"direct",
        [&] { return bytes * passes / Must(model->RunDirect(64, passes)).seconds / 1e9; }}});
  (*report)["fp32_logits_gbps"] = Median(gbps.at("server"));
  (*report)["logits"] = {{"shapes", "64-64-24000, batch 64, 6.1 MB an answer, 4 in flight"},
                         {"server_gbps", Spread(gbps.at("server"))},
                         {"server_share_of_its_core", Median(server_share)},
                         {"client_share_of_its_core", Median(client_share)},
                         {"direct_computes_gbps", Spread(gbps.at("direct"))}};
}

// Processor time of the server for a turn of `load`.
double ProcessorSeconds(const Server& server, KnownAnswersLoad* load,
                        const KnownAnswersLoad::Options& options) {
  const double before = server.ProcessorSeconds();
  Must(load->Run(options));
  return server.ProcessorSeconds() - before;
}

void MeasureCache(const Plan& plan, Json* report) {
  PredictionConfig settings;
  settings.set_cache_bytes(64 << 20);
  {
    const auto model = ResNet20(plan);
    const auto server = Must(model->Serve(settings));
    KnownAnswersLoad load(server->address(), 1, &model->known());
    KnownAnswersLoad::Options computed, hits;
    computed.rows = hits.rows = 64;
    computed.in_flight = hits.in_flight = 2;
    hits.with_ids = hits.repeat = true;
    Size(plan, &load, &computed);
    Size(plan, &load, &hits);
    const auto rates = Alternate(plan.rounds, {{"computed", [&] { return Rate(&load, computed); }},
                                               {"hits", [&] { return Rate(&load, hits); }}});
    (*report)["cache_hit_speedup"] = MedianRatio(rates.at("hits"), rates.at("computed"));
    (*report)["cache_resnet20"] = {{"shapes", "images 3x32x32, 10 classes, batch 64"},
                                   {"computed_examples_per_second", Spread(rates.at("computed"))},
                                   {"hit_examples_per_second", Spread(rates.at("hits"))}};
  }
  const auto model = Mlp(plan, "small", 32, "16", 10);
  const auto server = Must(model->Serve(settings));
  KnownAnswersLoad load(server->address(), 1, &model->known());
  KnownAnswersLoad::Options plain, misses;
  plain.rows = misses.rows = 256;
  plain.in_flight = misses.in_flight = 2;
  misses.with_ids = true;
  Size(plan, &load, &plain);
  misses.requests = plain.requests;
  // Until the cache is full, so that every miss takes another's place.
  for (int i = 0; i < 3; ++i) Must(load.Run(misses));
  const auto seconds = Alternate(
      plan.rounds, {{"plain", [&] { return ProcessorSeconds(*server, &load, plain); }},
                    {"misses", [&] { return ProcessorSeconds(*server, &load, misses); }}});
  std::vector<double> each;
  const double rows = static_cast<double>(plain.requests) * 256;
  for (int i = 0; i < plan.rounds; ++i) {
    each.push_back(1e6 * (seconds.at("misses")[i] - seconds.at("plain")[i]) / rows);
  }
  (*report)["cache_miss_us"] = Median(each);
  (*report)["cache_small"] = {
      {"shapes", "32-16-10, batch 256, ids that were never used"},
      {"miss_us_a_row", Spread(each)},
      {"plain_us_a_row", Spread(Scaled(seconds.at("plain"), 1e6 / rows))},
      {"misses_us_a_row", Spread(Scaled(seconds.at("misses"), 1e6 / rows))}};
}

// Far more requests than there is room for: processor time beyond that of the passes, by refusal.
void MeasureRefusals(const Plan& plan, Json* report) {
  PredictionConfig settings;
  settings.set_max_queue(2);
  settings.set_max_batch_size(1);
  const auto model = Mlp(plan, "mlp_refusing", 1024, "4096,4096", 1000);
  // What it spends on staying awake is none of the passes'.
  const auto server = Must(model->Serve(settings, {"--spin_us=0"}));
  KnownAnswersLoad load(server->address(), 16, &model->known());
  KnownAnswersLoad::Options alone, flood;
  Size(plan, &load, &alone);
  flood.in_flight = 16;
  flood.may_be_refused = true;
  flood.requests = static_cast<int>(plan.turn_seconds * 10000);
  std::vector<double> each, rates;
  int64_t refused = 0, hinted = 0;
  for (int i = 0; i < plan.rounds; ++i) {
    const double pass = ProcessorSeconds(*server, &load, alone) / alone.requests;
    const double before = server->ProcessorSeconds();
    const KnownAnswersLoad::Result result = Must(load.Run(flood));
    const double spent = server->ProcessorSeconds() - before;
    each.push_back(1e6 * (spent - pass * static_cast<double>(result.answered)) /
                   static_cast<double>(result.refused));
    rates.push_back(static_cast<double>(result.refused) / result.seconds);
    refused += result.refused;
    hinted += result.hinted;
  }
  (*report)["refusal_us"] = Median(each);
  (*report)["refusals"] = {{"us_each", Spread(each)},
                           {"per_second", Spread(rates)},
                           {"refused", refused},
                           {"with_retry_delay", hinted}};
}

// What a second compute thread wins, with both cores for the server and its client.
void MeasureThreads(const Plan& plan, Json* report) {
  const auto model = ResNet20(plan);
  std::map<int, std::unique_ptr<Server>> servers;
  std::map<int, std::unique_ptr<KnownAnswersLoad>> loads;
  KnownAnswersLoad::Options batches;
  batches.rows = 64;
  batches.in_flight = 4;
  for (const int threads : {1, 2}) {
    servers[threads] =
        Must(model->Serve({}, {absl::StrCat("--compute_threads=", threads)}, kAnyCore));
    loads[threads] =
        std::make_unique<KnownAnswersLoad>(servers[threads]->address(), 1, &model->known());
    Size(plan, loads[threads].get(), &batches);
  }
  Check(Unpin());
  const auto rates = Alternate(plan.rounds, {{"1", [&] { return Rate(loads[1].get(), batches); }},
                                             {"2", [&] { return Rate(loads[2].get(), batches); }}});
  Check(PinToCore(kClientCore));
  (*report)["two_threads_gain"] = MedianRatio(rates.at("2"), rates.at("1"));
  (*report)["threads_resnet20"] = {{"shapes", "images 3x32x32, 10 classes, batch 64, 4 in flight"},
                                   {"pinning", "none"},
                                   {"1_thread_examples_per_second", Spread(rates.at("1"))},
                                   {"2_threads_examples_per_second", Spread(rates.at("2"))}};
}

int Main(int argc, char** argv) {
  DisableDeadlockDetection();
  RetainHeap();
  const std::vector<std::pair<std::string, std::function<void(const Plan&, Json*)>>> sections = {
      {"resnet", MeasureResNet}, {"mlp", MeasureBatching},      {"logits", MeasureLogits},
      {"cache", MeasureCache},   {"refusals", MeasureRefusals}, {"threads", MeasureThreads}};
  Plan plan;
  std::set<std::string> asked;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool known = std::any_of(sections.begin(), sections.end(),
                                   [&](const auto& section) { return section.first == argument; });
    if (argument == "--quick") {
      plan.rounds = 3;
      plan.turn_seconds = 0.5;
    } else if (known) {
      asked.insert(argument);
    } else {
      std::fprintf(stderr,
                   "usage: prediction [--quick] [resnet|mlp|logits|cache|refusals|threads]...\n");
      return 2;
    }
  }
  if (std::thread::hardware_concurrency() < 2) {
    std::fprintf(stderr, "prediction: needs two cores, one for the server, one for its clients\n");
    return 1;
  }
  const absl::Status pinned = PinToCore(kClientCore);
  if (!pinned.ok()) {
    std::fprintf(stderr, "prediction: %s\n", pinned.ToString().c_str());
    return 1;
  }
  const char* const directory = std::getenv("TEST_TMPDIR");
  plan.directory = directory == nullptr ? "/tmp" : directory;
  Json report = NewReport("prediction", plan.rounds,
                          absl::StrCat("server and libtorch's loop on core ", kServerCore,
                                       ", clients on core ", kClientCore));
  report["threads"] = 1;
  for (const auto& [name, measure] : sections) {
    if (!asked.empty() && asked.count(name) == 0) continue;
    measure(plan, &report);
    std::printf("%s: %s\n", name.c_str(), report.dump().c_str());
    std::fflush(stdout);
  }
  PrintReport(report);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) { return codistill::Main(argc, argv); }
