#ifndef CODISTILL_WORKER_TEACHER_ENDPOINTS_H_
#define CODISTILL_WORKER_TEACHER_ENDPOINTS_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace codistill {

// The servers of one teacher, and which of them to ask next: the one whose work under way, weighed
// with the latency its answers have had, is least.
//
// A latency that has not been confirmed for a while is believed less and less (half-life 2 s,
// towards half that of the fastest server), so that a server that was slow once is tried again. A
// server that failed is left alone for a time that doubles with every failure in a row, from 50 ms
// to half a second: short enough that one that returns is used again within a second (its channel
// tries to connect as often). One that refuses for load is left alone for as long as it says
// (google.rpc.RetryInfo; at most 10 s are believed), whatever its answers to earlier questions, and
// no longer than that for refusing again.
//
// A caller that gives up learns only that a server takes longer than the caller waits. One given up
// on again and again without an answer in between is therefore believed to be twice as slow each
// time, up to 16 times as slow as the fastest of the others and 10 s: it is asked every few
// seconds, not for its share.
//
// Knows neither channel nor clock. Not thread-safe.
class TeacherEndpoints {
 public:
  // `first_index`: of these addresses in the channel that reaches them. `seed`: of the jitter,
  // which is to differ between students.
  TeacherEndpoints(std::vector<std::string> addresses, int first_index, uint64_t seed);

  int size() const { return static_cast<int>(servers_.size()); }
  const std::string& address(int server) const { return servers_[server].address; }
  int channel_index(int server) const { return first_index_ + server; }

  // The server to ask at `now`, other than `but`; -1 if all are to be left alone.
  int Choose(absl::Time now, int but = -1) const;
  // When there will be one to choose: infinite past if there is now, infinite future if there is no
  // other server at all.
  absl::Time NextAvailable(int but = -1) const;

  // What happens to the questions: each is Sent, and then exactly one of the others.
  void Sent(int server);
  void Answered(int server, absl::Duration latency, absl::Time now);
  // Cancelled by the caller, `elapsed` after it was sent: no failure, but a latency of at least
  // that.
  void GivenUp(int server, absl::Duration elapsed, absl::Time now);
  // True if the server's last question had not failed: news.
  bool Failed(int server, const absl::Status& error, absl::Time now);

  // Generation of its group that a server answers from; 0 = none, or not told.
  uint64_t generation(int server) const { return servers_[server].generation; }
  // When it changed last.
  absl::Time generation_since(int server) const { return servers_[server].generation_since; }
  void set_generation(int server, uint64_t generation, absl::Time now);

 private:
  struct Server {
    std::string address;
    int outstanding = 0;
    int64_t sent = 0;
    int failures_in_row = 0;
    int given_up_in_row = 0;                        // rounds
    absl::Time given_up_at = absl::InfinitePast();  // end of the last round
    absl::Time not_before = absl::InfinitePast();   // for it failed
    absl::Time busy_until = absl::InfinitePast();   // it said so
    double latency = 0;                             // seconds, exponential mean; 0 = not known
    absl::Time measured_at = absl::InfinitePast();
    uint64_t generation = 0;
    absl::Time generation_since = absl::InfinitePast();

    absl::Time available() const { return std::max(not_before, busy_until); }
  };
  // The least latency known, but for that of server `but`; 0 if none is.
  double Fastest(int but = -1) const;
  static double Latency(const Server& server, double fastest, absl::Time now);
  static void Observe(double seconds, absl::Time now, Server* server);
  double Random(int server);  // in [0, 1)

  std::vector<Server> servers_;
  int first_index_;
  uint64_t seed_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_ENDPOINTS_H_
