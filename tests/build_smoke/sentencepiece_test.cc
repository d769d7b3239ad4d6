#include <sentencepiece_processor.h>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(SentencePieceTest, NamesAMissingModel) {
  sentencepiece::SentencePieceProcessor processor;
  EXPECT_NE(processor.Load("no_such.model").ToString().find("no_such.model"), std::string::npos);
}

}  // namespace
}  // namespace codistill
