#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/config/batch_fields.h"
#include "common/config/embedding.h"
#include "common/config/validate.h"
#include "common/tensor/tensor.h"

namespace codistill {
namespace internal {
namespace {

using Strings = google::protobuf::RepeatedPtrField<std::string>;

constexpr int64_t kMaxSyntheticElements = int64_t{1} << 30;  // 4 GiB of floats, held in memory
constexpr int64_t kMaxImageSide = 4096;
constexpr int64_t kMaxUnroll = 65536;
constexpr int64_t kMaxCardinality = (int64_t{1} << 31) - 1;  // readers keep 32 bits

std::string Index(absl::string_view field, int i) { return absl::StrCat(field, "[", i, "]"); }

void CheckFiles(const std::string& path, const Strings& files, bool required, Mistakes* mistakes) {
  if (required) mistakes->Required(path, !files.empty(), "one file or more");
  for (int i = 0; i < files.size(); ++i) {
    mistakes->Required(Index(path, i), !files[i].empty(), "the name of a file");
  }
}

// Number of classes of a data set as far as the job tells; 0 = only the files know.
int64_t Classes(const DatasetConfig& dataset) {
  if (dataset.has_synthetic()) return dataset.synthetic().classes();
  if (dataset.has_csv()) {
    for (const CsvColumn& column : dataset.csv().columns()) {
      if (column.kind() == CsvColumn::LABEL) return column.label_values_size();
    }
  }
  return 0;
}

void CheckSynthetic(const SyntheticConfig& config, const std::string& path, Mistakes* mistakes) {
  mistakes->AtLeast(path + ".inputs", config.inputs(), 1);
  for (int i = 0; i < config.hidden_size(); ++i) {
    mistakes->AtLeast(Index(path + ".hidden", i), config.hidden(i), 1);
  }
  mistakes->AtLeast(path + ".classes", config.classes(), 2);
  mistakes->AtLeast(path + ".examples", config.examples(), 1);
  if (config.inputs() > 0 && config.examples() > kMaxSyntheticElements / config.inputs()) {
    mistakes->Add(path + ".examples",
                  absl::StrCat("too many to hold in memory (", config.examples(), "); at most ",
                               kMaxSyntheticElements / config.inputs(), " with ", config.inputs(),
                               " inputs would be right"));
  }
  if (!(config.label_noise() >= 0 && config.label_noise() <= 1)) {
    mistakes->Add(path + ".label_noise",
                  absl::StrCat("out of range (", config.label_noise(), "); 0 to 1 would be right"));
  }
  mistakes->Positive(path + ".logit_scale", config.logit_scale());
}

void CheckLabelColumn(const CsvColumn& column, const std::string& path, bool trim,
                      Mistakes* mistakes) {
  std::set<std::string> texts;
  for (int i = 0; i < column.label_values_size(); ++i) {
    const std::string field = absl::StrCat(Index(path + ".label_values", i), ".text");
    mistakes->Required(field, column.label_values(i).text_size() > 0,
                       "the spellings of this class");
    for (const std::string& text : column.label_values(i).text()) {
      if (!texts.insert(text).second) {
        mistakes->Add(field, absl::StrCat("given twice (", text,
                                          "); one class a text would be "
                                          "right"));
      }
      if (trim && absl::StripAsciiWhitespace(text) != text) {
        mistakes->Add(field, absl::StrCat("blanks around the text (", text,
                                          "), which trim takes off the values; none would be "
                                          "right"));
      }
    }
  }
}

void CheckCsv(const CsvConfig& config, const std::string& path, Mistakes* mistakes) {
  CheckFiles(path + ".files", config.files(), /*required=*/true, mistakes);
  CheckFiles(path + ".fit_files", config.fit_files(), /*required=*/false, mistakes);
  if (config.delimiter().size() != 1 || config.delimiter() == "\n" || config.delimiter() == "\r") {
    mistakes->Add(path + ".delimiter",
                  absl::StrCat("wrong delimiter (\"", config.delimiter(),
                               "\"); one character, such as \",\" or \"\\t\", would be right"));
  }
  mistakes->AtLeast(path + ".skip_lines", config.skip_lines(), 0);
  mistakes->Required(path + ".columns", config.columns_size() > 0,
                     "one entry a column of the file");
  if (config.columns_size() == 0) return;

  std::vector<std::string> labels;
  int features = 0;
  std::set<std::string> names;
  for (int i = 0; i < config.columns_size(); ++i) {
    const CsvColumn& column = config.columns(i);
    const std::string inner = Index(path + ".columns", i);
    if (!column.name().empty() && !names.insert(column.name()).second) {
      mistakes->Add(inner + ".name",
                    absl::StrCat("used twice (", column.name(), "); unique names would be right"));
    }
    const bool numeric = column.kind() == CsvColumn::NUMERIC;
    const bool categorical = column.kind() == CsvColumn::CATEGORICAL;
    const bool label = column.kind() == CsvColumn::LABEL;
    features += numeric || categorical || column.kind() == CsvColumn::HASHED;
    if (label) labels.push_back(column.name().empty() ? absl::StrCat(i) : column.name());
    if (column.log1p() && !numeric) {
      mistakes->Add(inner + ".log1p",
                    absl::StrCat("only possible with kind NUMERIC (kind is ",
                                 CsvColumn::Kind_Name(column.kind()), "); false would be right"));
    }
    if (column.cardinality() != 0 && !categorical) {
      mistakes->Add(inner + ".cardinality",
                    absl::StrCat("only possible with kind CATEGORICAL (kind is ",
                                 CsvColumn::Kind_Name(column.kind()), "); 0 would be right"));
    } else if (column.cardinality() > kMaxCardinality) {
      mistakes->Add(inner + ".cardinality",
                    absl::StrCat("too many (", column.cardinality(), "); at most ", kMaxCardinality,
                                 " would be right"));
    } else if (column.cardinality() < 0 || column.cardinality() == 1) {
      mistakes->Add(inner + ".cardinality",
                    absl::StrCat("leaves no index for a value (", column.cardinality(),
                                 "); at least 2, or 0 for as many as the files have, would be "
                                 "right"));
    }
    if (column.label_values_size() > 0 && !label) {
      mistakes->Add(inner + ".label_values",
                    absl::StrCat("only possible with kind LABEL (kind is ",
                                 CsvColumn::Kind_Name(column.kind()), "); none would be right"));
    }
    if (label) CheckLabelColumn(column, inner, config.trim(), mistakes);
  }
  if (labels.size() != 1) {
    mistakes->Add(path + ".columns",
                  absl::StrCat("wrong number of columns of kind LABEL (",
                               labels.empty() ? "none" : absl::StrJoin(labels, ", "),
                               "); exactly one would be right"));
  }
  if (features == 0) {
    mistakes->Add(path + ".columns",
                  "no column of kind NUMERIC, CATEGORICAL or HASHED; one or more would be right");
  }
}

void CheckText(const TextConfig& config, const std::string& path, Mistakes* mistakes) {
  CheckFiles(path + ".files", config.files(), /*required=*/true, mistakes);
  CheckFiles(path + ".vocabulary_files", config.vocabulary_files(), /*required=*/false, mistakes);
  mistakes->Between(path + ".unroll", config.unroll(), 1, kMaxUnroll);
  const std::string& unknown = config.unknown();
  if (unknown.empty() || std::any_of(unknown.begin(), unknown.end(),
                                     [](unsigned char c) { return absl::ascii_isspace(c); })) {
    mistakes->Add(path + ".unknown",
                  absl::StrCat("no word (\"", unknown, "\"); text without blanks would be right"));
  }
}

void CheckImage(const ImageConfig& config, const std::string& path, bool training,
                Mistakes* mistakes) {
  CheckFiles(path + ".files", config.files(), /*required=*/true, mistakes);
  mistakes->Between(path + ".height", config.height(), 1, kMaxImageSide);
  mistakes->Between(path + ".width", config.width(), 1, kMaxImageSide);
  mistakes->Between(path + ".random_crop_padding", config.random_crop_padding(), 0,
                    std::max<int64_t>(0, std::min(config.height(), config.width())));
  if (training) return;
  if (config.random_flip()) {
    mistakes->Add(path + ".random_flip",
                  "only possible in data.train (true); false would be right");
  }
  if (config.random_crop_padding() != 0) {
    mistakes->Add(path + ".random_crop_padding",
                  absl::StrCat("only possible in data.train (", config.random_crop_padding(),
                               "); 0 would be right"));
  }
}

// Whether the labels of a source are what the loss takes.
void CheckLabels(const ModelConfig& model, const DatasetConfig& dataset, const std::string& path,
                 Mistakes* mistakes) {
  const int64_t classes = Classes(dataset);
  const std::string loss = LabelLoss_Name(model.label_loss());
  const std::string classes_field =
      absl::StrCat(path, dataset.has_csv() ? ".csv.columns" : ".synthetic.classes");
  switch (model.label_loss()) {
    case SQUARED_ERROR:
      if (!dataset.has_csv()) {
        mistakes->Add("model.label_loss",
                      absl::StrCat("needs numeric labels, and ", path, " has classes (", loss,
                                   "); SOFTMAX_CROSS_ENTROPY would be right"));
      } else if (classes > 0) {
        mistakes->Add(classes_field, absl::StrCat("the LABEL column has label_values (", classes,
                                                  " classes), but ", loss,
                                                  " needs numeric labels; none would be "
                                                  "right"));
      }
      return;
    case SIGMOID_CROSS_ENTROPY:
      if (dataset.has_text()) {
        mistakes->Add("model.label_loss", absl::StrCat("does not fit text (", loss,
                                                       "); SOFTMAX_CROSS_ENTROPY would be right"));
      } else if (!dataset.has_image() && classes != 2) {
        mistakes->Add(classes_field, absl::StrCat("wrong number of classes (", classes, "); 2, as ",
                                                  loss, " needs them, would be right"));
      }
      return;
    case SOFTMAX_CROSS_ENTROPY:
      if (dataset.has_csv() && classes < 2) {
        mistakes->Add(classes_field,
                      absl::StrCat("too few label_values in the LABEL column (", classes,
                                   "); one a class, as ", loss, " needs them, would be right"));
      } else if ((dataset.has_csv() || dataset.has_synthetic()) && model.num_outputs() >= 2 &&
                 classes != model.num_outputs()) {
        mistakes->Add("model.num_outputs",
                      absl::StrCat("not the number of classes (", model.num_outputs(), "); the ",
                                   classes, " of ", path, " would be right"));
      }
      return;
  }
}

void CheckDataset(const JobConfig& job, const DatasetConfig& dataset, const std::string& path,
                  bool training, Mistakes* mistakes) {
  switch (dataset.source_case()) {
    case DatasetConfig::kSynthetic:
      CheckSynthetic(dataset.synthetic(), path + ".synthetic", mistakes);
      break;
    case DatasetConfig::kCsv:
      CheckCsv(dataset.csv(), path + ".csv", mistakes);
      break;
    case DatasetConfig::kText:
      CheckText(dataset.text(), path + ".text", mistakes);
      break;
    case DatasetConfig::kImage:
      CheckImage(dataset.image(), path + ".image", training, mistakes);
      break;
    case DatasetConfig::SOURCE_NOT_SET:
      mistakes->Add(path, "no source; one of synthetic, csv, text, image would be right");
      return;
  }
  if (!training) return;  // that it fits the training set is checked elsewhere
  CheckLabels(job.model(), dataset, path, mistakes);
  if (job.model().states_size() > 0 && !dataset.has_text()) {
    mistakes->Add("model.states",
                  absl::StrCat("recurrent state needs lanes of text to be carried along (", path,
                               " has none); no states, or a text source, would be right"));
  }
}

std::string FileList(const Strings& files) {
  return files.empty() ? "none" : absl::StrJoin(files, ", ");
}

bool SameFiles(const Strings& a, const Strings& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// What was fitted on the training set must be fitted on the same files, in the same way, for the
// validation set: else the same record gives other numbers.
void CheckFit(const std::string& field, const Strings& ours, const Strings& our_files,
              const Strings& theirs, const Strings& their_files, Mistakes* mistakes) {
  const Strings& fitted = ours.empty() ? our_files : ours;
  const Strings& wanted = theirs.empty() ? their_files : theirs;
  if (!wanted.empty() && !SameFiles(fitted, wanted)) {
    mistakes->Add(field, absl::StrCat("not what the training set is fitted on (", FileList(ours),
                                      "); ", FileList(wanted), " would be right"));
  }
}

void CheckSame(const std::string& field, bool same, Mistakes* mistakes) {
  const std::string ours = absl::StrCat("data.validation.", field);
  // Where one of the two is wrong in itself, that they differ follows.
  if (!same && !mistakes->HasWithin(ours) && !mistakes->HasWithin("data.train." + field)) {
    mistakes->Add(ours,
                  absl::StrCat("differs from data.train.", field, "; the same would be right"));
  }
}

bool SameColumns(const CsvConfig& a, const CsvConfig& b) {
  return std::equal(a.columns().begin(), a.columns().end(), b.columns().begin(), b.columns().end(),
                    [](const CsvColumn& x, const CsvColumn& y) {
                      return x.kind() == y.kind() && x.log1p() == y.log1p() &&
                             x.cardinality() == y.cardinality() &&
                             x.label_values_size() == y.label_values_size();
                    });
}

// The two data sets must give the same kind of example: one model sees both.
void CheckTogether(const DatasetConfig& train, const DatasetConfig& validation,
                   Mistakes* mistakes) {
  if (train.source_case() == DatasetConfig::SOURCE_NOT_SET ||
      validation.source_case() == DatasetConfig::SOURCE_NOT_SET) {
    return;
  }
  if (train.source_case() != validation.source_case()) {
    mistakes->Add("data.validation",
                  "another kind of source than data.train; the same kind would be right");
    return;
  }
  if (train.has_synthetic()) {
    const SyntheticConfig& a = train.synthetic();
    const SyntheticConfig& b = validation.synthetic();
    CheckSame("synthetic.inputs", a.inputs() == b.inputs(), mistakes);
    CheckSame(
        "synthetic.hidden",
        std::equal(a.hidden().begin(), a.hidden().end(), b.hidden().begin(), b.hidden().end()),
        mistakes);
    CheckSame("synthetic.classes", a.classes() == b.classes(), mistakes);
    CheckSame("synthetic.seed", a.seed() == b.seed(), mistakes);
    CheckSame("synthetic.logit_scale", a.logit_scale() == b.logit_scale(), mistakes);
  } else if (train.has_csv()) {
    const CsvConfig& a = train.csv();
    const CsvConfig& b = validation.csv();
    CheckFit("data.validation.csv.fit_files", b.fit_files(), b.files(), a.fit_files(), a.files(),
             mistakes);
    CheckSame("csv.columns", SameColumns(a, b), mistakes);
    CheckSame("csv.delimiter", a.delimiter() == b.delimiter(), mistakes);
    CheckSame("csv.skip_lines", a.skip_lines() == b.skip_lines(), mistakes);
    CheckSame("csv.trim", a.trim() == b.trim(), mistakes);
    CheckSame("csv.missing", SameFiles(a.missing(), b.missing()), mistakes);
  } else if (train.has_text()) {
    const TextConfig& a = train.text();
    const TextConfig& b = validation.text();
    CheckFit("data.validation.text.vocabulary_files", b.vocabulary_files(), b.files(),
             a.vocabulary_files(), a.files(), mistakes);
    CheckSame("text.unknown", a.unknown() == b.unknown(), mistakes);
    CheckSame("text.unroll", a.unroll() == b.unroll(), mistakes);
  } else {
    CheckSame("image.height", train.image().height() == validation.image().height(), mistakes);
    CheckSame("image.width", train.image().width() == validation.image().width(), mistakes);
  }
}

}  // namespace

void CheckData(const JobConfig& job, Mistakes* mistakes) {
  const DataConfig& data = job.data();
  if (!data.has_train()) {
    mistakes->Add("data.train",
                  "missing; one of synthetic, csv, text, image inside it would be right");
  } else {
    CheckDataset(job, data.train(), "data.train", /*training=*/true, mistakes);
  }
  if (data.has_validation()) {
    CheckDataset(job, data.validation(), "data.validation", /*training=*/false, mistakes);
    CheckTogether(data.train(), data.validation(), mistakes);
  } else if (job.evaluator().enabled()) {
    mistakes->Add("data.validation",
                  "missing; a data set for the evaluator, or evaluator.enabled: false, would be "
                  "right");
  }
}

void CheckModelInputs(const JobConfig& job, Mistakes* mistakes) {
  const DatasetConfig& train = job.data().train();
  const std::vector<BatchField> fields = BatchFields(train);
  if (fields.empty()) return;  // that the source is incomplete was said
  for (int i = 0; i < job.model().inputs_size(); ++i) {
    const ModelInput& input = job.model().inputs(i);
    const std::string& name = InputField(input);
    if (name.empty()) continue;
    const std::string path = Index("model.inputs", i);
    const auto field = std::find_if(fields.begin(), fields.end(),
                                    [&name](const BatchField& f) { return f.name == name; });
    if (field == fields.end()) {
      mistakes->Add(absl::StrCat(path, input.has_field() ? ".field" : ".name"),
                    absl::StrCat("no field of data.train (", name, "); ",
                                 absl::StrJoin(fields, " or ",
                                               [](std::string* out, const BatchField& f) {
                                                 out->append(f.name);
                                               }),
                                 " would be right"));
      continue;
    }
    if (input.dtype() != field->dtype) {
      mistakes->Add(absl::StrCat(path, ".dtype"),
                    absl::StrCat("not that of the field (", DataType_Name(input.dtype()), "); ",
                                 DataType_Name(field->dtype), " would be right"));
    }
    const std::vector<int64_t> shape(input.shape().begin(), input.shape().end());
    if (shape != field->shape) {
      mistakes->Add(absl::StrCat(path, ".shape"),
                    absl::StrCat("not that of the field (", ShapeString(shape), "); ",
                                 ShapeString(field->shape), " would be right"));
    }
  }
}

}  // namespace internal
}  // namespace codistill
