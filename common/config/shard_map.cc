#include "common/config/shard_map.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/config/text_proto.h"
#include "common/tensor/tensor.h"

namespace codistill {
namespace {

constexpr uint32_t kFormatVersion = 1;
constexpr int64_t kCutElements = 16;  // pieces begin at cache lines of fp32
constexpr size_t kMaxTensorListBytes = size_t{64} << 20;

absl::Span<const int64_t> Shape(const TensorSpec& spec) { return spec.shape(); }

std::string Describe(const TensorSpec& spec) {
  return absl::StrCat(spec.name(), " ", DataTypeName(spec.dtype()), " ", ShapeString(Shape(spec)),
                      " ", TensorSpec::Role_Name(spec.role()),
                      spec.tied_to().empty() ? "" : absl::StrCat(" to ", spec.tied_to()));
}

absl::Status CheckTensors(const TensorList& list) {
  std::set<std::string> owners;  // tensors with storage
  std::set<std::string> names;
  for (int i = 0; i < list.tensors_size(); ++i) {
    const TensorSpec& spec = list.tensors(i);
    const auto error = [&](absl::string_view problem) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", i, " (", spec.name(), "): ", problem));
    };
    if (spec.name().empty()) return error("no name");
    if (!names.insert(spec.name()).second) return error("name used twice");
    if (!TensorSpec::Role_IsValid(spec.role()) || spec.role() == TensorSpec::ROLE_INVALID) {
      return error("no role; PARAMETER, BUFFER, FROZEN or TIED would be right");
    }
    if (ElementSize(spec.dtype()) == 0) {
      return error(absl::StrCat("unknown dtype (", static_cast<int>(spec.dtype()), ")"));
    }
    if (spec.role() == TensorSpec::PARAMETER && spec.dtype() != DT_FLOAT) {
      return error(absl::StrCat("wrong dtype of a PARAMETER (", DataTypeName(spec.dtype()),
                                "); FP32 would be right"));
    }
    if (ElementCount(Shape(spec)) < 0) {
      return error(absl::StrCat("impossible shape (", ShapeString(Shape(spec)), ")"));
    }
    if (spec.role() != TensorSpec::TIED) owners.insert(spec.name());
  }
  for (const TensorSpec& spec : list.tensors()) {
    if (spec.role() == TensorSpec::TIED && owners.count(spec.tied_to()) == 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", spec.name(), ": tied to a tensor that does not exist (", spec.tied_to(), ")"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ShardMap> BuildShardMap(const TensorList& tensors, int num_shards) {
  if (num_shards < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("wrong number of shards (", num_shards, "); at least 1 would be right"));
  }
  CODISTILL_RETURN_IF_ERROR(CheckTensors(tensors));
  ShardMap map;
  map.set_format_version(kFormatVersion);
  map.set_num_shards(num_shards);
  *map.mutable_tensors() = tensors.tensors();

  struct Whole {
    int64_t bytes;
    int tensor;
  };
  std::vector<Whole> wholes;
  std::vector<int64_t> shard_bytes(num_shards, 0);
  std::vector<Piece> pieces;
  const auto add = [&](int tensor, int shard, int64_t begin, int64_t count) {
    Piece piece;
    piece.set_tensor(tensor);
    piece.set_shard(shard);
    piece.set_begin(begin);
    piece.set_count(count);
    pieces.push_back(std::move(piece));
    shard_bytes[shard] +=
        count * static_cast<int64_t>(ElementSize(tensors.tensors(tensor).dtype()));
  };

  for (int t = 0; t < tensors.tensors_size(); ++t) {
    const TensorSpec& spec = tensors.tensors(t);
    const int64_t elements = ElementCount(Shape(spec));
    if (spec.role() == TensorSpec::TIED || elements == 0) continue;
    if (spec.role() == TensorSpec::BUFFER || elements < kSplitElements) {
      wholes.push_back({elements * static_cast<int64_t>(ElementSize(spec.dtype())), t});
      continue;
    }
    const int64_t units = (elements + kCutElements - 1) / kCutElements;
    for (int s = 0; s < num_shards; ++s) {
      // units * (s + 1) in 128 bits: it may pass 2^63 for absurd tensors.
      const auto cut = [&](int shard) {
        const auto unit = static_cast<int64_t>(static_cast<__int128>(units) * shard / num_shards);
        return std::min(elements, unit * kCutElements);
      };
      if (cut(s + 1) > cut(s)) add(t, s, cut(s), cut(s + 1) - cut(s));
    }
  }

  std::sort(wholes.begin(), wholes.end(), [&tensors](const Whole& a, const Whole& b) {
    if (a.bytes != b.bytes) return a.bytes > b.bytes;
    return tensors.tensors(a.tensor).name() < tensors.tensors(b.tensor).name();
  });
  for (const Whole& whole : wholes) {
    const auto least = std::min_element(shard_bytes.begin(), shard_bytes.end());
    add(whole.tensor, static_cast<int>(least - shard_bytes.begin()), 0,
        ElementCount(Shape(tensors.tensors(whole.tensor))));
  }

  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return std::make_pair(a.tensor(), a.begin()) < std::make_pair(b.tensor(), b.begin());
  });
  for (Piece& piece : pieces) *map.add_pieces() = std::move(piece);
  return map;
}

std::vector<uint64_t> BytesOfShards(const ShardMap& map) {
  std::vector<uint64_t> bytes(map.num_shards(), 0);
  for (const Piece& piece : map.pieces()) {
    bytes[piece.shard()] += static_cast<uint64_t>(piece.count()) *
                            ElementSize(map.tensors(static_cast<int>(piece.tensor())).dtype());
  }
  return bytes;
}

uint64_t ShardMapDigest(const ShardMap& map) {
  // Over the values in a fixed order, not over protobuf's bytes, which it does not promise to keep.
  uint64_t digest =
      Mix(map.format_version(), map.num_shards(), map.tensors_size(), map.pieces_size());
  for (const TensorSpec& spec : map.tensors()) {
    digest = Mix(digest, HashString(spec.name()), spec.dtype(), spec.role(),
                 HashString(spec.tied_to()), spec.shape_size());
    for (const int64_t dimension : spec.shape()) digest = Mix(digest, dimension);
  }
  for (const Piece& piece : map.pieces()) {
    digest = Mix(digest, piece.tensor(), piece.shard(), piece.begin(), piece.count());
  }
  return digest == 0 ? 1 : digest;
}

std::string FirstDifference(const TensorList& ours, const TensorList& theirs) {
  const int common = std::min(ours.tensors_size(), theirs.tensors_size());
  for (int i = 0; i < common; ++i) {
    const std::string a = Describe(ours.tensors(i));
    const std::string b = Describe(theirs.tensors(i));
    if (a != b) return absl::StrCat("tensor ", i, " is ", a, " here and ", b, " there");
  }
  if (ours.tensors_size() == theirs.tensors_size()) return "";
  const bool more = ours.tensors_size() > common;
  return absl::StrCat(ours.tensors_size(), " tensors here and ", theirs.tensors_size(),
                      " there; only ", more ? "here" : "there", ": ",
                      Describe((more ? ours : theirs).tensors(common)));
}

absl::StatusOr<TensorList> LoadTensorList(const std::string& path) {
  CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxTensorListBytes));
  TensorList list;
  ErrorList errors;
  for (const TextProtoError& error : ParseTextProto(text, &list)) errors.Add(error.ToString());
  CODISTILL_RETURN_IF_ERROR(errors.ToStatus(absl::StrCat(path, ":")));
  if (list.tensors_size() == 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": no tensors in it"));
  }
  CODISTILL_RETURN_IF_ERROR(Annotate(CheckTensors(list), path));
  return list;
}

}  // namespace codistill
