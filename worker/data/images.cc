// Image archives, one folder a class: ImageConfig in proto/job.proto. Names and places are kept in
// memory; images are read and decoded as batches need them, so that training starts at once, and
// the first of them are kept, up to a bound, so that a data set may be larger than the memory.

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/base/parallel.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "worker/data/image_decoder.h"
#include "worker/data/sources.h"
#include "worker/data/tar_reader.h"

namespace codistill {
namespace {

constexpr uint64_t kMaxImageBytes = uint64_t{256} << 20;

bool IsImageName(absl::string_view base_name) {
  const std::string lower = absl::AsciiStrToLower(base_name);
  return !absl::StartsWith(lower, ".") &&
         (absl::EndsWith(lower, ".jpg") || absl::EndsWith(lower, ".jpeg") ||
          absl::EndsWith(lower, ".png"));
}

// Where one image is.
struct Place {
  int32_t archive = -1;  // index of its tar file; -1 = a file of its own
  std::string name;      // in the tar file, or the path
  uint64_t offset = 0;
  uint64_t size = 0;  // tar only
  std::string label;  // name of the folder
};

// All images of a list of tar files and directories, in a fixed order.
class ImageFiles {
 public:
  static absl::StatusOr<ImageFiles> Find(const std::vector<std::string>& paths) {
    ImageFiles files;
    for (const std::string& path : paths) {
      const size_t before = files.places_.size();
      if (FileSystem::Real()->IsDirectory(path)) {
        CODISTILL_RETURN_IF_ERROR(files.AddDirectory(path, "", 0));
      } else {
        CODISTILL_RETURN_IF_ERROR(files.AddTar(path));
      }
      if (files.places_.size() == before) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": no images in it; CLASS/NAME.jpg, .jpeg or .png would be right"));
      }
    }
    return files;
  }

  const std::vector<Place>& places() const { return places_; }

  // How errors name an image.
  std::string NameOf(const Place& place) const {
    return place.archive < 0 ? place.name
                             : absl::StrCat(archives_[place.archive]->path(), ": ", place.name);
  }

  absl::Status Read(const Place& place, std::string* bytes) const {
    if (place.archive < 0) {
      CODISTILL_ASSIGN_OR_RETURN(*bytes, ReadFile(place.name, kMaxImageBytes));
      return absl::OkStatus();
    }
    bytes->resize(static_cast<size_t>(place.size));
    return archives_[place.archive]->ReadAt(place.offset, bytes->size(), &(*bytes)[0]);
  }

 private:
  // Adds an image found at `relative` below the folder or archive at `root`.
  absl::Status Add(const std::string& root, absl::string_view relative, Place place) {
    std::vector<absl::string_view> parts = absl::StrSplit(relative, '/', absl::SkipEmpty());
    parts.erase(std::remove(parts.begin(), parts.end(), "."), parts.end());
    if (parts.size() != 2 && parts.size() != 3) {
      return absl::InvalidArgumentError(
          absl::StrCat(root, ": image ", relative,
                       " is in no class; CLASS/NAME, under one leading folder at most, would be "
                       "right"));
    }
    if (place.size > kMaxImageBytes) {
      return absl::InvalidArgumentError(absl::StrCat(root, ": ", relative, " has ", place.size,
                                                     " bytes; at most ", kMaxImageBytes,
                                                     " would be right"));
    }
    place.label = std::string(parts[parts.size() - 2]);
    places_.push_back(std::move(place));
    return absl::OkStatus();
  }

  absl::Status AddTar(const std::string& path) {
    CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> archive,
                               FileSystem::Real()->OpenForRead(path));
    CODISTILL_ASSIGN_OR_RETURN(std::vector<TarEntry> entries, ListTar(*archive));
    for (TarEntry& entry : entries) {
      if (!IsImageName(BaseName(entry.name))) continue;
      Place place;
      place.archive = static_cast<int32_t>(archives_.size());
      place.offset = entry.offset;
      place.size = entry.size;
      place.name = std::move(entry.name);
      const std::string name = place.name;
      CODISTILL_RETURN_IF_ERROR(Add(path, name, std::move(place)));
    }
    archives_.push_back(std::move(archive));
    return absl::OkStatus();
  }

  absl::Status AddDirectory(const std::string& root, const std::string& relative, int depth) {
    constexpr int kMaxDepth = 2;  // LEADING/CLASS
    const std::string path = relative.empty() ? root : JoinPath(root, relative);
    CODISTILL_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                               FileSystem::Real()->ListDir(path));
    for (const std::string& name : names) {
      const std::string inner = relative.empty() ? name : JoinPath(relative, name);
      if (IsImageName(name)) {
        Place place;
        place.name = JoinPath(root, inner);
        CODISTILL_RETURN_IF_ERROR(Add(root, inner, std::move(place)));
      } else if (depth < kMaxDepth && FileSystem::Real()->IsDirectory(JoinPath(root, inner))) {
        CODISTILL_RETURN_IF_ERROR(AddDirectory(root, inner, depth + 1));
      }
    }
    return absl::OkStatus();
  }

  std::vector<std::unique_ptr<ReadableFile>> archives_;
  std::vector<Place> places_;
};

// Decoded images, as they are before augmentation: decoding takes longer than anything else that a
// batch needs. The first that come stay until there is no more room. An epoch takes every image
// once, in another order each time, so that whatever were evicted would be wanted as soon as what
// took its place. Thread-safe.
class DecodedImages {
 public:
  DecodedImages(size_t images, int64_t max_bytes) : max_bytes_(max_bytes), images_(images) {}

  // Null if it is not kept. Valid as long as this.
  const Image* Find(int64_t index) const {
    MutexLock lock(&mu_);
    return images_[static_cast<size_t>(index)].get();
  }
  void Keep(int64_t index, const Image& image) {
    const auto bytes = static_cast<int64_t>(image.pixels.size() + sizeof(Image));
    MutexLock lock(&mu_);
    std::unique_ptr<const Image>& place = images_[static_cast<size_t>(index)];
    if (place != nullptr || bytes > max_bytes_ - bytes_) return;
    place = std::make_unique<const Image>(image);
    bytes_ += bytes;
  }

 private:
  const int64_t max_bytes_;
  mutable Mutex mu_;
  std::vector<std::unique_ptr<const Image>> images_ ABSL_GUARDED_BY(mu_);  // by index
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

class ImageDataset : public Dataset {
 public:
  ImageDataset(const DatasetOptions& options, Shape shape, ImageFiles files,
               std::vector<int32_t> labels)
      : Dataset(internal::ConfigOf(options), options.job->model().label_loss(), std::move(shape)),
        config_(internal::ConfigOf(options).image()),
        augmented_(config_.random_flip() || config_.random_crop_padding() > 0),
        augmentation_seed_(Mix(options.job->seed(), HashString("augmentation"), options.group)),
        salt_(internal::IdSalt(options)),
        threads_(options.threads),
        files_(std::move(files)),
        labels_(std::move(labels)),
        decoded_(labels_.size(), options.decoded_image_bytes) {}

  static absl::StatusOr<std::unique_ptr<Dataset>> Create(const DatasetOptions& options) {
    const std::string field = internal::FieldOf(options);
    CODISTILL_ASSIGN_OR_RETURN(
        const std::vector<std::string> paths,
        internal::ResolveFiles(field + ".image.files", internal::ConfigOf(options).image().files(),
                               options.data_dir));
    CODISTILL_ASSIGN_OR_RETURN(ImageFiles files, ImageFiles::Find(paths));
    // Classes are numbered by the training set's folders, also for a validation set that has not
    // got all of them.
    std::set<std::string> names;
    if (options.training) {
      for (const Place& place : files.places()) names.insert(place.label);
    } else {
      CODISTILL_ASSIGN_OR_RETURN(
          const std::vector<std::string> training,
          internal::ResolveFiles("data.train.image.files",
                                 options.job->data().train().image().files(), options.data_dir));
      CODISTILL_ASSIGN_OR_RETURN(const ImageFiles training_files, ImageFiles::Find(training));
      for (const Place& place : training_files.places()) names.insert(place.label);
    }
    std::map<std::string, int32_t> classes;
    for (const std::string& name : names) classes.emplace(name, classes.size());
    std::vector<int32_t> labels;
    for (const Place& place : files.places()) {
      const auto found = classes.find(place.label);
      if (found == classes.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat(files.NameOf(place), ": class ", place.label,
                         " is not among those of data.train: ", absl::StrJoin(names, ", ")));
      }
      labels.push_back(found->second);
    }
    Shape shape;
    shape.size = static_cast<int64_t>(labels.size());
    shape.num_classes = static_cast<int64_t>(classes.size());
    shape.summary = absl::StrCat(labels.size(), " images of ", absl::StrJoin(paths, ", "), " in ",
                                 classes.size(), " classes");
    return std::make_unique<ImageDataset>(options, std::move(shape), std::move(files),
                                          std::move(labels));
  }

  absl::Status Fill(absl::Span<const ExampleRef> refs, Batch* batch) const override {
    const auto examples = static_cast<int64_t>(refs.size());
    Allocate(examples, batch);
    float* planes = batch->fields[0].tensor.As<float>().data();
    const auto ids = batch->example_ids.As<int64_t>();
    const int64_t elements = 3 * config_.height() * config_.width();
    Mutex mutex;
    absl::Status first_error;
    int64_t first_failed = examples;
    ParallelFor(threads_, examples, /*grain=*/8, [&](int64_t begin, int64_t end) {
      ImageDecoder decoder;
      Image image;
      std::string bytes;
      for (int64_t i = begin; i < end; ++i) {
        const Image* found = decoded_.Find(refs[i].index);
        absl::Status status;
        if (found == nullptr) {
          status = Load(refs[i].index, &decoder, &bytes, &image);
          if (status.ok()) decoded_.Keep(refs[i].index, image);
          found = &image;
        }
        if (!status.ok()) {
          const MutexLock lock(&mutex);
          if (i < first_failed) {
            first_failed = i;
            first_error = status;
          }
          return;
        }
        ToPlanes(*found, config_.height(), config_.width(), AugmentationOf(refs[i]),
                 planes + i * elements);
        SetClass(i, labels_[refs[i].index], batch);
        ids[i] = static_cast<int64_t>(
            augmented_ ? Mix(salt_, refs[i].index, augmentation_seed_, refs[i].epoch)
                       : Mix(salt_, refs[i].index));
      }
    });
    return first_error;
  }

  void CountLabels(absl::Span<const ExampleRef> refs, absl::Span<int64_t> counts) const override {
    for (const ExampleRef& ref : refs) ++counts[labels_[ref.index]];
  }

 private:
  absl::Status Load(int64_t index, ImageDecoder* decoder, std::string* bytes, Image* image) const {
    const Place& place = files_.places()[index];
    absl::Status status = files_.Read(place, bytes);
    if (status.ok()) status = decoder->Decode(*bytes, image);
    return Annotate(status, files_.NameOf(place));
  }

  Augmentation AugmentationOf(const ExampleRef& ref) const {
    Augmentation augmentation;
    if (!augmented_) return augmentation;
    RandomStream random(Mix(augmentation_seed_, ref.epoch, ref.index));
    augmentation.flip = config_.random_flip() && random.Below(2) == 1;
    augmentation.padding = config_.random_crop_padding();
    augmentation.crop_x = static_cast<int64_t>(random.Below(2 * augmentation.padding + 1));
    augmentation.crop_y = static_cast<int64_t>(random.Below(2 * augmentation.padding + 1));
    return augmentation;
  }

  const ImageConfig config_;
  const bool augmented_;
  const uint64_t augmentation_seed_;
  const uint64_t salt_;
  const int threads_;
  const ImageFiles files_;
  const std::vector<int32_t> labels_;
  mutable DecodedImages decoded_;
};

}  // namespace

namespace internal {

absl::StatusOr<std::unique_ptr<Dataset>> CreateImages(const DatasetOptions& options) {
  return ImageDataset::Create(options);
}

}  // namespace internal
}  // namespace codistill
