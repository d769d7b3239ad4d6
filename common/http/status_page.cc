#include "common/http/status_page.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "google/protobuf/util/json_util.h"

namespace codistill {
namespace {

constexpr char kHead[] =
    "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
    "<meta http-equiv=\"refresh\" content=\"5\">\n"
    "<style>body{font:14px sans-serif;margin:2em;color:#222}table{border-collapse:collapse;"
    "margin:0 0 1.5em}th,td{text-align:left;padding:.25em .9em .25em 0;border-bottom:1px solid "
    "#ddd;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    "h1{font-size:1.4em}h2{font-size:1.1em}.state{font-weight:bold}</style>\n";

std::string Number(double value) {
  if (std::isfinite(value) && value == std::floor(value) && std::fabs(value) < 1e15) {
    return absl::StrFormat("%.0f", value);
  }
  return absl::StrFormat("%.4g", value);
}

std::string Seconds(double seconds) {
  const absl::Duration duration = absl::Seconds(seconds);
  return absl::FormatDuration(absl::Trunc(
      duration, duration < absl::Minutes(1) ? absl::Milliseconds(100) : absl::Seconds(1)));
}

std::string VersionText(const Version& version) {
  return absl::StrCat(version.generation(), ".", version.step());
}

// A cell of a table: text, or a number, which is set to the right.
struct Cell {
  Cell(const std::string& text) : html(EscapeHtml(text)) {}  // NOLINT(runtime/explicit)
  Cell(const char* text) : Cell(std::string(text)) {}        // NOLINT(runtime/explicit)
  Cell(double value) : html(Number(value)), number(true) {}  // NOLINT(runtime/explicit)
  std::string html;
  bool number = false;
};

void Heading(absl::string_view title, std::string* html) {
  absl::StrAppend(html, "<h2>", EscapeHtml(title), "</h2>\n");
}

void Row(std::initializer_list<Cell> cells, std::string* html) {
  absl::StrAppend(html, "<tr>");
  for (const Cell& cell : cells) {
    absl::StrAppend(html, cell.number ? "<td class=\"n\">" : "<td>", cell.html, "</td>");
  }
  absl::StrAppend(html, "</tr>\n");
}

void HeaderRow(std::initializer_list<const char*> names, std::string* html) {
  absl::StrAppend(html, "<table><tr>");
  for (const char* name : names) absl::StrAppend(html, "<th>", name, "</th>");
  absl::StrAppend(html, "</tr>\n");
}

void Counters(const WorkerCounters& counters, std::string* html) {
  absl::StrAppend(html, "<table>\n");
  Row({"steps applied", static_cast<double>(counters.steps())}, html);
  Row({"examples", static_cast<double>(counters.examples())}, html);
  Row({"examples/s", counters.examples_per_second()}, html);
  Row({"pushes dropped late", static_cast<double>(counters.pushes_dropped())}, html);
  Row({"pushes rejected", static_cast<double>(counters.pushes_rejected())}, html);
  Row({"pushes too stale", static_cast<double>(counters.pushes_too_stale())}, html);
  Row({"pushes answered as duplicates", static_cast<double>(counters.pushes_duplicate())}, html);
  Row({"pushes without an answer", static_cast<double>(counters.pushes_lost())}, html);
  Row({"steps decided before they were begun", static_cast<double>(counters.steps_skipped())},
      html);
  Row({"bytes pushed", static_cast<double>(counters.push_bytes())}, html);
  Row({"bytes pulled", static_cast<double>(counters.pull_bytes())}, html);
  Row({"teacher requests", static_cast<double>(counters.teacher_requests())}, html);
  Row({"teacher failures", static_cast<double>(counters.teacher_failures())}, html);
  Row({"steps with a teacher", static_cast<double>(counters.teacher_used_steps())}, html);
  Row({"steps without one after burn-in", static_cast<double>(counters.teacher_skipped_steps())},
      html);
  if (counters.teacher_used_steps() > 0) {
    const double steps = counters.teacher_used_steps();
    Row({"first step with a teacher", static_cast<double>(counters.first_step_used())}, html);
    Row({"staleness, mean (steps)", counters.sum_staleness_steps() / steps}, html);
    Row({"staleness, most (steps)", static_cast<double>(counters.max_staleness_steps())}, html);
    Row({"prefetch lag, mean (steps)", counters.sum_prefetch_lag_steps() / steps}, html);
  }
  Row({"computing", Seconds(counters.compute_seconds())}, html);
  Row({"waiting", Seconds(counters.wait_seconds())}, html);
  absl::StrAppend(html, "</table>\n");
}

void Group(const DaemonStatus& status, std::string* html) {
  const GroupState& group = status.group_state();
  Heading("Group", html);
  absl::StrAppend(html, "<table>\n");
  Row({"phase", GroupState::Phase_Name(group.phase())}, html);
  Row({"version", VersionText(group.version())}, html);
  Row({"newest cut", VersionText(group.newest_cut())}, html);
  if (group.stop_steps() > 0) {
    Row({"stops at step", static_cast<double>(group.stop_steps())}, html);
  }
  if (!group.error().empty()) Row({"error", group.error()}, html);
  for (int i = 0; i < group.shard_addresses_size(); ++i) {
    Row({absl::StrCat("shard ", i), group.shard_addresses(i)}, html);
  }
  absl::StrAppend(html, "</table>\n");
}

// What became of every rank's pushes: one answer from every shard.
void Pushes(const GetHistoryReply& history, std::string* html) {
  if (history.pushes_size() == 0) return;
  Heading("Answers to pushes, over all shards", html);
  HeaderRow({"rank", "begun", "applied", "dropped late", "too stale", "rejected", "duplicate",
             "refused", "lost", "open"},
            html);
  for (const RankPushes& rank : history.pushes()) {
    const PushCounts& c = rank.counts();
    Row({static_cast<double>(rank.rank()), static_cast<double>(c.begun()),
         static_cast<double>(c.applied()), static_cast<double>(c.dropped_late()),
         static_cast<double>(c.too_stale()), static_cast<double>(c.rejected()),
         static_cast<double>(c.duplicate()), static_cast<double>(c.refused()),
         static_cast<double>(c.lost()), static_cast<double>(c.open())},
        html);
  }
  absl::StrAppend(html, "</table>\n");
  const MembershipCounts& members = history.membership();
  absl::StrAppend(html, "<p>Workers: ", members.members(), " take part; ", members.joined(),
                  " joined, ", members.left(), " left, ", members.replaced(),
                  " were replaced, the leases of ", members.leases_ended(), " ended.</p>\n");
}

void Members(const DaemonStatus& status, std::string* html) {
  Heading("Workers", html);
  HeaderRow({"rank", "state", "steps", "examples/s", "teacher steps", "skipped", "heartbeat",
             "incarnation", "address", "status page"},
            html);
  for (const MemberStatus& member : status.members()) {
    const WorkerCounters& counters = member.counters();
    Row({static_cast<double>(member.rank()), member.state(), static_cast<double>(counters.steps()),
         counters.examples_per_second(), static_cast<double>(counters.teacher_used_steps()),
         static_cast<double>(counters.teacher_skipped_steps()),
         absl::StrCat(Seconds(member.seconds_since_heartbeat()), " ago"),
         static_cast<double>(member.incarnation()), member.address(), member.http_address()},
        html);
  }
  absl::StrAppend(html, "</table>\n");
  Pushes(status.history(), html);
}

void History(const GetHistoryReply& history, std::string* html) {
  constexpr int kShown = 20;
  if (history.training_size() > 0) {
    Heading("Training, newest first", html);
    HeaderRow({"step", "label loss", "teacher loss", "teacher weight", "learning rate",
               "examples/s", "time"},
              html);
    for (int i = history.training_size() - 1; i >= 0 && i >= history.training_size() - kShown;
         --i) {
      const TrainingPoint& point = history.training(i);
      Row({static_cast<double>(point.step()), point.label_loss(), point.teacher_loss(),
           point.teacher_weight(), point.learning_rate(), point.examples_per_second(),
           Seconds(point.seconds())},
          html);
    }
    absl::StrAppend(html, "</table>\n");
  }
  if (history.evaluations_size() > 0) {
    Heading("Evaluations, newest first", html);
    HeaderRow({"version", "examples", "loss", "accuracy", "AUC", ""}, html);
    for (int i = history.evaluations_size() - 1; i >= 0 && i >= history.evaluations_size() - kShown;
         --i) {
      const EvaluationResult& result = history.evaluations(i);
      Row({VersionText(result.version()), static_cast<double>(result.examples()), result.loss(),
           result.has_accuracy() ? Cell(result.accuracy()) : Cell(""),
           result.has_auc() ? Cell(result.auc()) : Cell(""), result.final() ? "final" : ""},
          html);
    }
    absl::StrAppend(html, "</table>\n");
  }
  if (history.restores() > 0) {
    absl::StrAppend(html, "<p>Restored ", history.restores(), " times.</p>\n");
  }
  Heading("Totals of all workers", html);
  Counters(history.totals(), html);
}

void Shards(const DaemonStatus& status, std::string* html) {
  Heading("Shards", html);
  HeaderRow({"shard", "bytes of weights", "bytes of slots", "pieces", "pulls", "bytes pulled",
             "pushes", "bytes pushed", "updates"},
            html);
  bool tables = false;
  for (const ShardLoad& shard : status.shards()) {
    Row({static_cast<double>(shard.shard()), static_cast<double>(shard.weight_bytes()),
         static_cast<double>(shard.slot_bytes()), static_cast<double>(shard.pieces()),
         static_cast<double>(shard.pulls()), static_cast<double>(shard.pull_bytes()),
         static_cast<double>(shard.pushes()), static_cast<double>(shard.push_bytes()),
         static_cast<double>(shard.commits())},
        html);
    tables = tables || shard.tables_size() > 0;
  }
  absl::StrAppend(html, "</table>\n");
  if (!tables) return;
  Heading("Embedding tables", html);
  HeaderRow({"table", "shard", "rows", "waiting for admission", "bytes", "created", "evicted",
             "gradients not admitted", "gradients refused"},
            html);
  for (const ShardLoad& shard : status.shards()) {
    for (const EmbeddingTableStatus& table : shard.tables()) {
      Row({table.name(), static_cast<double>(shard.shard()), static_cast<double>(table.rows()),
           static_cast<double>(table.waiting()), static_cast<double>(table.bytes()),
           static_cast<double>(table.created()), static_cast<double>(table.evicted()),
           static_cast<double>(table.not_admitted()), static_cast<double>(table.refused())},
          html);
    }
  }
  absl::StrAppend(html, "</table>\n");
}

void Models(const DaemonStatus& status, std::string* html) {
  Heading("Models", html);
  HeaderRow({"model", "version", "held", "precision", "newest step of its group", "requests",
             "failures", "refused", "waiting", "mean latency (ms)", "swaps", "failed loads"},
            html);
  for (const ServedModelStatus& model : status.models()) {
    Row({model.model(), VersionText(model.version()), static_cast<double>(model.held_size()),
         model.precision(), static_cast<double>(model.latest_step()),
         static_cast<double>(model.requests()), static_cast<double>(model.failures()),
         static_cast<double>(model.refused()), static_cast<double>(model.queued()),
         model.mean_latency_ms(), static_cast<double>(model.swaps()),
         static_cast<double>(model.failed_loads())},
        html);
  }
  absl::StrAppend(html, "</table>\n");
  Heading("Forward passes", html);
  HeaderRow({"model", "passes", "examples", "examples a pass", "cached predictions given",
             "not in the cache", "bytes of the cache"},
            html);
  for (const ServedModelStatus& model : status.models()) {
    Row({model.model(), static_cast<double>(model.batches()), static_cast<double>(model.examples()),
         static_cast<double>(model.examples()) /
             static_cast<double>(std::max<int64_t>(1, model.batches())),
         static_cast<double>(model.cache_hits()), static_cast<double>(model.cache_misses()),
         static_cast<double>(model.cache_bytes())},
        html);
  }
  absl::StrAppend(html, "</table>\n");
  for (const ServedModelStatus& model : status.models()) {
    if (model.last_load_error().empty()) continue;
    absl::StrAppend(html, "<p>", EscapeHtml(model.model()),
                    ": last failed load: ", EscapeHtml(model.last_load_error()), "</p>\n");
  }
}

}  // namespace

std::string EscapeHtml(absl::string_view text) {
  std::string escaped;
  escaped.reserve(text.size());
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

std::string RenderStatusPage(const DaemonStatus& status) {
  const std::string title =
      EscapeHtml(status.group().empty()
                     ? absl::StrCat(status.kind(), " ", status.index())
                     : absl::StrCat(status.kind(), " ", status.group(), "/", status.index()));
  std::string html = kHead;
  absl::StrAppend(&html, "<title>", title, "</title></head><body>\n<h1>", title, "</h1>\n");
  absl::StrAppend(&html, "<p><span class=\"state\">", EscapeHtml(status.state()), "</span> ",
                  EscapeHtml(status.detail()), "</p>\n<table>\n");
  Row({"job", status.job()}, &html);
  Row({"run", status.run_id()}, &html);
  Row({"generation", static_cast<double>(status.generation())}, &html);
  Row({"step", static_cast<double>(status.step())}, &html);
  if (!status.rate_unit().empty()) Row({status.rate_unit(), status.rate()}, &html);
  Row({"up for", Seconds(status.uptime_seconds())}, &html);
  Row({"process", static_cast<double>(status.pid())}, &html);
  Row({"gRPC", status.address()}, &html);
  Row({"HTTP", status.http_address()}, &html);
  Row({"version", status.version()}, &html);
  absl::StrAppend(&html, "</table>\n");
  if (status.has_group_state()) Group(status, &html);
  if (status.members_size() > 0) Members(status, &html);
  if (status.shards_size() > 0) Shards(status, &html);
  if (status.models_size() > 0) Models(status, &html);
  if (status.has_worker()) {
    Heading("This worker", &html);
    Counters(status.worker(), &html);
  }
  if (status.has_history()) History(status.history(), &html);
  absl::StrAppend(&html,
                  "<p><a href=\"/statusz?json\">JSON</a> <a href=\"/metrics\">metrics</a> "
                  "<a href=\"/healthz\">health</a> <a href=\"/readyz\">readiness</a></p>\n"
                  "</body></html>\n");
  return html;
}

std::string RenderStatusJson(const DaemonStatus& status) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string json;
  const auto result = google::protobuf::util::MessageToJsonString(status, &json, options);
  // Only text that is not UTF-8 can fail here.
  if (!result.ok()) return "{}\n";
  return json;
}

}  // namespace codistill
