#ifndef CODISTILL_CONTROL_REPORT_H_
#define CODISTILL_CONTROL_REPORT_H_

#include <string>

#include "control/summary.h"
#include "proto/run_summary.pb.h"

namespace codistill {

// One self-contained HTML page (no scripts, no references to other files): the summary as tables,
// and the curves of losses, accuracy and speed as inline SVG, a colour a group.
std::string ReportHtml(const RunResult& result, const RunSummary& summary);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_REPORT_H_
