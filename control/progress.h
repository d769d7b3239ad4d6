#ifndef CODISTILL_CONTROL_PROGRESS_H_
#define CODISTILL_CONTROL_PROGRESS_H_

#include <cstdio>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/control.pb.h"

namespace codistill {

// One line a group: step, loss, examples/s, teacher staleness, time left.
//   alpha   step  1200/3000  loss 1.234  val 1.301   12345 examples/s  teacher age 14  ETA 0:35
std::string ProgressLine(const DaemonStatus& leader);

// "35", "1:05:10": seconds, as people write durations. Negative or infinite: "?".
std::string ClockTime(double seconds);

// Shows the groups' progress. On a terminal the lines stay in place; elsewhere a block of lines is
// written each `interval`. Lines of `Say` go above. Not thread-safe.
class ProgressDisplay {
 public:
  // `json`: one line of JSON a group and update instead.
  ProgressDisplay(std::FILE* out, bool terminal, bool json);
  void Update(const std::vector<DaemonStatus>& leaders, absl::Time now);
  void Say(const std::string& line);
  // Leaves the last lines where they are.
  void Finish(const std::vector<DaemonStatus>& leaders);

 private:
  void Print(const std::vector<DaemonStatus>& leaders);

  std::FILE* const out_;
  const bool terminal_;
  const bool json_;
  int lines_on_screen_ = 0;
  absl::Time last_ = absl::InfinitePast();
};

}  // namespace codistill

#endif  // CODISTILL_CONTROL_PROGRESS_H_
