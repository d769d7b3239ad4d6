#include "worker/teacher_endpoints.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "absl/types/optional.h"
#include "common/base/random.h"
#include "common/base/retry_after.h"

namespace codistill {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr absl::Duration kLongestBackoff = absl::Milliseconds(500);
// A hint is believed up to here: nobody knows a queue for longer.
constexpr absl::Duration kLongestHint = absl::Seconds(10);
constexpr double kNewestWeight = 0.2;  // in the mean latency
constexpr double kHalfLifeSeconds = 2;
// A server that never answers is believed to be at most so slow, in seconds and as a multiple of
// the fastest other one.
constexpr double kSlowest = 10;
constexpr double kSlowestRatio = 16;

// Of a pause, so that students that were refused together do not come back together.
constexpr double kJitter = 0.4;

// How much of a measurement is left after `idle`: 1 to 0.
double Remembered(absl::Duration idle) {
  return std::exp2(-std::max(0.0, absl::ToDoubleSeconds(idle)) / kHalfLifeSeconds);
}

}  // namespace

TeacherEndpoints::TeacherEndpoints(std::vector<std::string> addresses, int first_index,
                                   uint64_t seed)
    : first_index_(first_index), seed_(seed) {
  for (std::string& address : addresses) {
    Server server;
    server.address = std::move(address);
    servers_.push_back(std::move(server));
  }
}

double TeacherEndpoints::Random(int server) {
  return UniformDouble(Mix(seed_++, static_cast<uint64_t>(server)));
}

double TeacherEndpoints::Latency(const Server& server, double fastest, absl::Time now) {
  const double floor = fastest / 2;
  if (server.latency == 0) return floor;  // worth finding out
  return floor + (server.latency - floor) * Remembered(now - server.measured_at);
}

double TeacherEndpoints::Fastest(int but) const {
  double fastest = 0;
  for (int i = 0; i < size(); ++i) {
    const double latency = servers_[i].latency;
    if (i != but && latency > 0 && (fastest == 0 || latency < fastest)) fastest = latency;
  }
  return fastest;
}

int TeacherEndpoints::Choose(absl::Time now, int but) const {
  double fastest = Fastest();
  if (fastest == 0) fastest = 1;  // nothing is known: all the same
  int best = -1;
  std::tuple<double, int64_t> least;
  for (int i = 0; i < size(); ++i) {
    const Server& server = servers_[i];
    if (i == but || server.available() > now) continue;
    const std::tuple<double, int64_t> cost((server.outstanding + 1) * Latency(server, fastest, now),
                                           server.sent);
    if (best < 0 || cost < least) {
      best = i;
      least = cost;
    }
  }
  return best;
}

absl::Time TeacherEndpoints::NextAvailable(int but) const {
  absl::Time next = absl::InfiniteFuture();
  for (int i = 0; i < size(); ++i) {
    if (i != but) next = std::min(next, servers_[i].available());
  }
  return next;
}

void TeacherEndpoints::Sent(int server) {
  ++servers_[server].outstanding;
  ++servers_[server].sent;
}

void TeacherEndpoints::Observe(double seconds, absl::Time now, Server* server) {
  seconds = std::max(seconds, 1e-6);
  const double weight = std::max(kNewestWeight, 1 - Remembered(now - server->measured_at));
  server->latency += (server->latency == 0 ? 1 : weight) * (seconds - server->latency);
  server->measured_at = now;
}

void TeacherEndpoints::Answered(int server, absl::Duration latency, absl::Time now) {
  Server& s = servers_[server];
  --s.outstanding;
  s.failures_in_row = 0;
  s.given_up_in_row = 0;
  // Not busy_until: an answer to an earlier question does not make room for the next one.
  s.not_before = absl::InfinitePast();
  Observe(absl::ToDoubleSeconds(latency), now, &s);
}

void TeacherEndpoints::GivenUp(int server, absl::Duration elapsed, absl::Time now) {
  Server& s = servers_[server];
  --s.outstanding;
  const double seconds = absl::ToDoubleSeconds(elapsed);
  if (seconds > s.latency) Observe(seconds, now, &s);
  // Questions that were under way together tell one thing.
  if (now - elapsed < s.given_up_at) return;
  s.given_up_at = now;
  const double fastest = Fastest(/*but=*/server);
  if (++s.given_up_in_row < 2 || fastest == 0) return;
  const double slowest = std::min(kSlowest, kSlowestRatio * fastest);
  s.latency = std::max(s.latency, std::min(2 * s.latency, slowest));
  s.measured_at = now;
}

bool TeacherEndpoints::Failed(int server, const absl::Status& error, absl::Time now) {
  Server& s = servers_[server];
  --s.outstanding;
  const absl::optional<absl::Duration> hint = RetryAfter(error);
  if (absl::IsResourceExhausted(error) && hint.has_value()) {
    // Alive and busy. Later than it says, never sooner.
    s.busy_until = std::max(s.busy_until,
                            now + std::min(*hint, kLongestHint) * (1 + kJitter * Random(server)));
    return false;
  }
  ++s.failures_in_row;
  const absl::Duration doubled = kFirstBackoff * (1 << std::min(s.failures_in_row - 1, 10));
  s.not_before = now + std::min(doubled, kLongestBackoff) * (1 - kJitter * Random(server));
  return s.failures_in_row == 1;
}

void TeacherEndpoints::set_generation(int server, uint64_t generation, absl::Time now) {
  Server& s = servers_[server];
  if (s.generation == generation) return;
  s.generation = generation;
  s.generation_since = now;
}

}  // namespace codistill
