#include "worker/teacher_list.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(TeacherListTest, AddressesOfTheOtherGroups) {
  JobConfig job;
  for (const char* name : {"alpha", "beta", "gamma"}) {
    auto* group = job.add_groups();
    group->set_name(name);
    group->add_prediction_servers()->set_address(absl::StrCat(name, ":1"));
    group->add_prediction_servers()->set_address(absl::StrCat(name, ":2"));
  }
  const auto teachers = TeacherServersOf(job, 1);
  ASSERT_EQ(teachers.size(), 2u);
  EXPECT_EQ(teachers[0].name, "alpha");
  EXPECT_THAT(teachers[1].addresses, ElementsAre("gamma:1", "gamma:2"));
  job.mutable_codistillation()->set_enabled(false);
  EXPECT_TRUE(TeacherServersOf(job, 1).empty());
}

TEST(AnswerSizesTest, CountsWhatTravels) {
  JobConfig job;
  for (const char* name : {"alpha", "beta"}) job.add_groups()->set_name(name);
  job.mutable_model()->set_num_outputs(24000);
  job.mutable_training()->set_batch_size(32);
  auto* codistillation = job.mutable_codistillation();
  const auto check = [&job](int64_t labels) {
    return std::string(CheckAnswerSizes(job, 0, labels).message());
  };
  EXPECT_EQ(check(16), "");
  EXPECT_THAT(check(32), AllOf(HasSubstr("training.batch_size: 32 examples of 32 labels and 24000 "
                                         "outputs as FP32 make answers of teacher beta of 93 MiB"),
                               HasSubstr("at most 64 MiB"), HasSubstr("teacher_output: TOP_K"),
                               HasSubstr("teacher_dtype")));
  codistillation->set_teacher_dtype(DT_HALF);
  EXPECT_EQ(check(32), "");
  EXPECT_THAT(check(64), HasSubstr("as FP16 make answers of teacher beta of 93 MiB"));
  codistillation->set_teacher_dtype(DT_INT8);
  EXPECT_EQ(check(64), "");
  EXPECT_THAT(check(100), HasSubstr("73 MiB"));
  codistillation->set_teacher_dtype(DT_FLOAT);
  codistillation->set_teacher_output(CodistillationConfig::TOP_K);
  codistillation->set_top_k(64);
  EXPECT_EQ(check(32), "");
  EXPECT_EQ(check(3900), "");
  EXPECT_THAT(check(4100), HasSubstr("the top 64 of 24000 outputs"));
  // Others answer what they have.
  TeacherConfig* teacher = job.add_teachers();
  teacher->set_name("big");
  teacher->mutable_external();
  EXPECT_THAT(check(32),
              AllOf(HasSubstr("24000 outputs as FP32 make answers of teacher big of 93 MiB"),
                    Not(HasSubstr("TOP_K"))));
  codistillation->set_enabled(false);
  EXPECT_EQ(check(32), "");
}

TEST(AnswerSizesTest, CountsRecurrentStates) {
  JobConfig job;
  for (const char* name : {"alpha", "beta"}) job.add_groups()->set_name(name);
  job.mutable_model()->set_num_outputs(2);
  job.mutable_training()->set_batch_size(1024);
  auto* state = job.mutable_model()->add_states();
  state->set_name("h");
  state->add_shape(16);
  state->add_shape(-1);
  state->add_shape(1024);
  EXPECT_THAT(std::string(CheckAnswerSizes(job, 0, 1).message()), HasSubstr("of 64 MiB"));
  job.mutable_training()->set_batch_size(1000);
  EXPECT_TRUE(CheckAnswerSizes(job, 0, 1).ok());
}

TEST(DialectTest, OfSomebodyElsesServers) {
  ModelConfig model;
  for (const char* name : {"image", "mask"}) model.add_inputs()->set_name(name);
  TeacherConfig teacher;
  teacher.set_name("big");
  ExternalTeacher* external = teacher.mutable_external();
  TeacherDialect dialect = DialectOf(model, teacher);
  EXPECT_EQ(dialect.model, "big");
  EXPECT_EQ(dialect.version, "");
  EXPECT_THAT(dialect.inputs, ElementsAre("image", "mask"));
  EXPECT_EQ(dialect.output, "logits");
  EXPECT_FALSE(dialect.probabilities);
  EXPECT_FALSE(dialect.codistill_server);
  EXPECT_TRUE(dialect.external());

  external->set_model("resnet152");
  external->set_version("3");
  auto* mapped = external->add_inputs();
  mapped->set_input("image");
  mapped->set_server("INPUT__0");
  external->set_output("OUTPUT__0");
  external->set_kind(ExternalTeacher::PROBABILITIES);
  external->set_codistill_server(true);
  dialect = DialectOf(model, teacher);
  EXPECT_EQ(dialect.model, "resnet152");
  EXPECT_EQ(dialect.version, "3");
  EXPECT_THAT(dialect.inputs, ElementsAre("INPUT__0", "mask"));
  EXPECT_EQ(dialect.output, "OUTPUT__0");
  EXPECT_TRUE(dialect.probabilities);
  EXPECT_TRUE(dialect.codistill_server);
}

TEST(TeacherListTest, TeachersOfSomebodyElse) {
  JobConfig job;
  job.mutable_model()->add_inputs()->set_name("x");
  job.add_groups()->set_name("alpha");
  TeacherConfig* teacher = job.add_teachers();
  teacher->set_name("theirs");
  teacher->mutable_external()->set_model("big");
  teacher->add_prediction_servers()->set_address("somewhere:8001");
  const auto teachers = TeacherServersOf(job, 0);
  ASSERT_EQ(teachers.size(), 1u);
  EXPECT_EQ(teachers[0].name, "theirs");
  EXPECT_EQ(teachers[0].dialect.model, "big");
  EXPECT_FALSE(teachers[0].dialect.codistill_server);
  EXPECT_THAT(teachers[0].addresses, ElementsAre("somewhere:8001"));
}

TEST(DialectTest, OfFrozenTeachersIsOurOwn) {
  TeacherConfig teacher;
  teacher.set_name("last_year");
  teacher.mutable_frozen()->set_archive("a.pt");
  const TeacherDialect dialect = DialectOf(ModelConfig(), teacher);
  EXPECT_EQ(dialect.model, "last_year");
  EXPECT_FALSE(dialect.external());
}

}  // namespace
}  // namespace codistill
