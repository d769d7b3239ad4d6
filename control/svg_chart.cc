#include "control/svg_chart.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace codistill {
namespace {

// Distinguishable with colour-blindness too (Okabe and Ito).
constexpr const char* kPalette[] = {"#0072b2", "#d55e00", "#009e73",
                                    "#cc79a7", "#e69f00", "#56b4e9"};
constexpr double kWidth = 640, kHeight = 300;
constexpr double kLeft = 60, kRight = 16, kTop = 34, kBottom = 40;

}  // namespace

std::string EscapeHtml(const std::string& text) {
  return absl::StrReplaceAll(text,
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}});
}

std::vector<double> RoundTicks(double low, double high, int count) {
  std::vector<double> ticks;
  if (!(high > low) || count < 1) return ticks;
  const double raw = (high - low) / count;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) {
      step = factor * power;
      break;
    }
  }
  const int64_t first = static_cast<int64_t>(std::ceil(low / step - 1e-9));
  for (int64_t i = first; i * step <= high + 1e-9 * step; ++i) ticks.push_back(i * step);
  return ticks;
}

std::string SvgChart(const std::string& title, const std::string& x_label,
                     const std::vector<ChartSeries>& series) {
  double x0 = INFINITY, x1 = -INFINITY, y0 = INFINITY, y1 = -INFINITY;
  for (const ChartSeries& s : series) {
    for (const auto& [x, y] : s.xy) {
      if (!std::isfinite(x) || !std::isfinite(y)) continue;
      x0 = std::min(x0, x);
      x1 = std::max(x1, x);
      y0 = std::min(y0, y);
      y1 = std::max(y1, y);
    }
  }
  if (x0 > x1) return "";
  if (x1 == x0) x1 = x0 + 1;
  const double pad = y1 > y0 ? 0.05 * (y1 - y0) : std::max(0.5, std::abs(y0) * 0.05);
  y0 -= pad;
  y1 += pad;
  const auto px = [&](double x) {
    return kLeft + (x - x0) / (x1 - x0) * (kWidth - kLeft - kRight);
  };
  const auto py = [&](double y) {
    return kHeight - kBottom - (y - y0) / (y1 - y0) * (kHeight - kTop - kBottom);
  };
  std::string out = absl::StrFormat(
      "<svg viewBox=\"0 0 %g %g\" role=\"img\" aria-label=\"%s\">\n"
      "<text x=\"%g\" y=\"16\" class=\"title\">%s</text>\n",
      kWidth, kHeight, EscapeHtml(title), kLeft, EscapeHtml(title));
  for (const double y : RoundTicks(y0, y1, 5)) {
    absl::StrAppendFormat(&out,
                          "<line x1=\"%g\" x2=\"%g\" y1=\"%.1f\" y2=\"%.1f\" class=\"grid\"/>"
                          "<text x=\"%g\" y=\"%.1f\" class=\"y\">%g</text>\n",
                          kLeft, kWidth - kRight, py(y), py(y), kLeft - 6, py(y) + 4, y);
  }
  for (const double x : RoundTicks(x0, x1, 6)) {
    absl::StrAppendFormat(&out, "<text x=\"%.1f\" y=\"%g\" class=\"x\">%g</text>\n", px(x),
                          kHeight - kBottom + 16, x);
  }
  absl::StrAppendFormat(&out, "<text x=\"%g\" y=\"%g\" class=\"x\">%s</text>\n",
                        (kLeft + kWidth - kRight) / 2, kHeight - 6, EscapeHtml(x_label));
  double legend = kWidth - kRight;
  for (auto it = series.rbegin(); it != series.rend(); ++it) {
    const ChartSeries& s = *it;
    const char* color = kPalette[s.color % (sizeof(kPalette) / sizeof(kPalette[0]))];
    std::string points;
    std::string marks;
    for (const auto& [x, y] : s.xy) {
      if (!std::isfinite(x) || !std::isfinite(y)) continue;
      absl::StrAppendFormat(&points, "%.1f,%.1f ", px(x), py(y));
      if (s.points) {
        absl::StrAppendFormat(&marks, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>",
                              px(x), py(y), color);
      }
    }
    absl::StrAppendFormat(&out, "<polyline points=\"%s\" stroke=\"%s\"/>%s\n", points, color,
                          marks);
    absl::StrAppendFormat(&out,
                          "<text x=\"%g\" y=\"16\" class=\"legend\" style=\"fill:%s\">%s</text>\n",
                          legend, color, EscapeHtml(s.label));
    legend -= 8.0 * s.label.size() + 16;
  }
  return out + "</svg>\n";
}

}  // namespace codistill
