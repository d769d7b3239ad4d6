#ifndef CODISTILL_CONTROL_SVG_CHART_H_
#define CODISTILL_CONTROL_SVG_CHART_H_

#include <string>
#include <utility>
#include <vector>

namespace codistill {

// One line of a chart.
struct ChartSeries {
  std::string label;
  int color = 0;        // index into the palette: the same group keeps its colour in all charts
  bool points = false;  // mark each point (few measurements), otherwise a plain line
  std::vector<std::pair<double, double>> xy;
};

// A line chart as an inline <svg> element with axes, ticks at round numbers and a legend. Values
// that are not finite are left out. Empty string if no series has a point.
std::string SvgChart(const std::string& title, const std::string& x_label,
                     const std::vector<ChartSeries>& series);

// Text as it may stand in HTML.
std::string EscapeHtml(const std::string& text);

// About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high].
std::vector<double> RoundTicks(double low, double high, int count);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_SVG_CHART_H_
