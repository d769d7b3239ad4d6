#include "common/config/batch_fields.h"

namespace codistill {

std::vector<BatchField> BatchFields(const DatasetConfig& dataset) {
  std::vector<BatchField> fields;
  switch (dataset.source_case()) {
    case DatasetConfig::kSynthetic:
      fields.push_back({"x", DT_FLOAT, {dataset.synthetic().inputs()}});
      break;
    case DatasetConfig::kCsv: {
      int64_t numeric = 0;
      int64_t categorical = 0;
      int64_t hashed = 0;
      for (const CsvColumn& column : dataset.csv().columns()) {
        numeric += column.kind() == CsvColumn::NUMERIC;
        categorical += column.kind() == CsvColumn::CATEGORICAL;
        hashed += column.kind() == CsvColumn::HASHED;
      }
      if (numeric > 0) fields.push_back({"numeric", DT_FLOAT, {numeric}});
      if (categorical > 0) fields.push_back({"categorical", DT_INT64, {categorical}});
      if (hashed > 0) fields.push_back({"hashed", DT_INT64, {hashed}});
      break;
    }
    case DatasetConfig::kText:
      fields.push_back({"tokens", DT_INT64, {dataset.text().unroll()}});
      break;
    case DatasetConfig::kImage:
      fields.push_back({"image", DT_FLOAT, {3, dataset.image().height(), dataset.image().width()}});
      break;
    case DatasetConfig::SOURCE_NOT_SET:
      break;
  }
  return fields;
}

}  // namespace codistill
