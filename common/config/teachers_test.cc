#include "common/config/teachers.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "common/base/file.h"
#include "common/config/job.h"
#include "common/config/schedule.h"
#include "common/config/test_jobs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

// Who teaches whom, and the rules on it.
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

constexpr char kTeachers[] = R"pb(
  teachers {
    name: "old"
    frozen { archive: "old.pt" checkpoint: "/ck/old" }
  }
  teachers {
    name: "older"
    frozen { archive: "/abs/older.pt" }
    num_prediction_servers: 2
  }
  teachers {
    name: "both"
    ensemble { members: "old" members: "older" }
  }
  teachers {
    name: "far"
    external {
      model: "net"
      inputs { input: "x" server: "INPUT__0" }
    }
    prediction_servers { address: "far:8001" }
  }
)pb";

std::string GoodWith(const std::string& more) { return std::string(kGood) + more; }
// `x` of kTeachers' external teacher is another name here.
std::string CsvWith(const std::string& more) {
  return std::string(kCsv) + absl::StrReplaceAll(more, {{"\"x\"", "\"numeric\""}});
}

std::vector<std::string> NamesOf(const std::vector<TeacherRef>& teachers) {
  std::vector<std::string> names;
  for (const TeacherRef& teacher : teachers) names.push_back(teacher.name);
  return names;
}

TEST(Teachers, AreTheGroupsOfTheTopology) {
  JobConfig job = Good();
  job.add_groups()->set_name("gamma");
  EXPECT_THAT(NamesOf(TeachersOf(job, 1)), ElementsAre("alpha", "gamma"));
  EXPECT_EQ(TeachersOf(job, 1)[1].index, 2);
  EXPECT_TRUE(HasGroupTeachers(job));
  job.mutable_codistillation()->set_topology(CodistillationConfig::RING);
  EXPECT_THAT(NamesOf(TeachersOf(job, 1)), ElementsAre("gamma"));
  EXPECT_THAT(NamesOf(TeachersOf(job, 2)), ElementsAre("alpha"));
  job.mutable_codistillation()->set_enabled(false);
  EXPECT_THAT(TeachersOf(job, 1), IsEmpty());
  EXPECT_FALSE(HasTeachers(job));

  JobConfig one = Good(kCsv);
  EXPECT_FALSE(HasTeachers(one));
  one.mutable_codistillation()->set_topology(CodistillationConfig::RING);
  EXPECT_THAT(TeachersOf(one, 0), IsEmpty());
}

TEST(Teachers, OfTheJobTeachEveryGroupThatNamesNobody) {
  JobConfig job = Good(GoodWith(kTeachers));
  EXPECT_THAT(NamesOf(TeachersOf(job, 0)), ElementsAre("beta", "old", "older", "both", "far"));
  job.mutable_groups(1)->add_teachers("both");
  job.mutable_groups(1)->add_teachers("alpha");
  const std::vector<TeacherRef> teachers = TeachersOf(job, 1);
  EXPECT_THAT(NamesOf(teachers), ElementsAre("both", "alpha"));
  EXPECT_EQ(teachers[0].kind, TeacherRef::kEnsemble);
  EXPECT_EQ(teachers[0].index, 2);
  EXPECT_EQ(teachers[1].kind, TeacherRef::kGroup);
  EXPECT_THAT(NamesOf(MembersOf(job, teachers[0])), ElementsAre("old", "older"));
  EXPECT_THAT(MembersOf(job, teachers[1]), IsEmpty());

  EXPECT_EQ(FindModel(job, "far")->kind, TeacherRef::kExternal);
  EXPECT_EQ(FindModel(job, "beta")->index, 1);
  EXPECT_EQ(PredictionServersOf(job, *FindModel(job, "far"))[0].address(), "far:8001");
  EXPECT_EQ(NumPredictionServers(job, *FindModel(job, "older")), 2);
  EXPECT_THAT(FindModel(job, "nobody").status().ToString(),
              HasSubstr("NOT_FOUND: no group or teacher \"nobody\" in job job; there are alpha, "
                        "beta, old, older, both, far"));
}

TEST(Teachers, OneGroupWithAFrozenTeacherIsTaught) {
  JobConfig job = Good(CsvWith("teachers { name: 'old' frozen { archive: 'old.pt' } }"));
  EXPECT_TRUE(HasTeachers(job));
  EXPECT_FALSE(HasGroupTeachers(job));
  EXPECT_EQ(TeacherWeightAt(job, 1), 1);
  EXPECT_FALSE(NeedsPredictionServers(job, *FindModel(job, "only"))) << "it teaches nobody";
  EXPECT_TRUE(NeedsPredictionServers(job, *FindModel(job, "old")));
  job.mutable_codistillation()->set_mode(CodistillationConfig::CHECKPOINTS);
  EXPECT_FALSE(NeedsPredictionServers(job, *FindModel(job, "old")));
  job.mutable_codistillation()->set_enabled(false);
  EXPECT_EQ(TeacherWeightAt(job, 1), 0);
}

TEST(Teachers, MembersOfAnEnsembleNeedNoServersOfTheirOwn) {
  JobConfig job = Good(GoodWith(kTeachers));
  for (int g = 0; g < 2; ++g) job.mutable_groups(g)->add_teachers("both");
  job.mutable_teachers(2)->mutable_ensemble()->add_members("alpha");
  EXPECT_TRUE(NeedsPredictionServers(job, *FindModel(job, "both")));
  EXPECT_FALSE(NeedsPredictionServers(job, *FindModel(job, "old")));
  EXPECT_FALSE(NeedsPredictionServers(job, *FindModel(job, "alpha")));
  EXPECT_FALSE(NeedsPredictionServers(job, *FindModel(job, "far")));
  EXPECT_TRUE(HasGroupTeachers(job)) << "alpha, by way of the ensemble";
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);
  job.mutable_groups(0)->set_num_prediction_servers(0);
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);
}

TEST(Teachers, RelativePathsStartAtTheJobFile) {
  const std::string path = WriteJob(GoodWith(kTeachers));
  const auto job = LoadJob(path);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->teachers(0).frozen().archive(), JoinPath(DirName(path), "old.pt"));
  EXPECT_EQ(job->teachers(0).frozen().checkpoint(), "/ck/old");
  EXPECT_EQ(job->teachers(1).frozen().archive(), "/abs/older.pt");
  EXPECT_FALSE(job->teachers(1).frozen().has_checkpoint());
  const auto elsewhere = LoadJob(path, {}, "/runs/a");
  ASSERT_TRUE(elsewhere.ok()) << elsewhere.status();
  EXPECT_EQ(elsewhere->teachers(0).frozen().archive(), "/runs/a/old.pt");
}

// One rule a line: a good job with these teachers, overrides that break it, the one message.
struct Rule {
  std::string text;
  std::vector<std::string> overrides;
  const char* message;
};

class TeacherRules : public testing::TestWithParam<Rule> {};

TEST_P(TeacherRules, AreEnforced) {
  EXPECT_THAT(Mistakes(GetParam().text, GetParam().overrides),
              ElementsAre(StartsWith(GetParam().message)));
}

const char kFrozen[] = "teachers { name: 'old' frozen { archive: 'old.pt' } }";

INSTANTIATE_TEST_SUITE_P(
    Job, TeacherRules,
    testing::ValuesIn(std::vector<Rule>{
        {GoodWith(kTeachers),
         {"groups[0].teachers=nosuch"},
         "groups[0].teachers[0]: is not another group or a teacher of the job (nosuch); one of "
         "beta, old, older, both, far would be right"},
        {GoodWith(kTeachers),
         {"groups[1].teachers=beta"},
         "groups[1].teachers[0]: is not another group or a teacher of the job (beta); one of "
         "alpha, old"},
        {GoodWith(kTeachers),
         {"groups[0].teachers=old,old"},
         "groups[0].teachers[1]: used twice (old)"},
        {GoodWith(kFrozen), {"teachers[0].name=alpha"}, "teachers[0].name: used twice (alpha); a"},
        {GoodWith(kFrozen), {"teachers[0].name=a/b"}, "teachers[0].name: unsafe name (a/b)"},
        {GoodWith("teachers { name: 'old' }"),
         {},
         "teachers[0]: missing source; one of frozen, ensemble and external would be right"},
        {GoodWith("teachers { name: 'old' frozen {} }"),
         {},
         "teachers[0].frozen.archive: missing; the path of a TorchScript archive"},
        {GoodWith(kFrozen),
         {"teachers[0].frozen.follow=true"},
         "teachers[0].frozen.follow: there is nothing to follow (true without checkpoint); a"},
        {GoodWith(kFrozen),
         {"teachers[0].num_prediction_servers=0"},
         "teachers[0].num_prediction_servers: out of range (0); 1 to"},
        {GoodWith(kTeachers),
         {"teachers[2].ensemble.members=old"},
         "teachers[2].ensemble.members: too few (1); two or more of alpha, beta, old, older would"},
        {GoodWith(kTeachers),
         {"teachers[2].ensemble.members=old,far"},
         "teachers[2].ensemble.members[1]: is not a group or a frozen teacher (far); one of"},
        {GoodWith(kTeachers),
         {"teachers[2].ensemble.members=old,both"},
         "teachers[2].ensemble.members[1]: is not a group or a frozen teacher (both); one of"},
        {GoodWith(kTeachers),
         {"teachers[2].ensemble.members=old,old"},
         "teachers[2].ensemble.members[1]: used twice (old)"},
        {std::string(kText) +
             "groups { name: 'b' } teachers { name: 'both' ensemble { members: 'only' members: 'b' "
             "} }",
         {},
         "teachers[0].ensemble: not with recurrent state (model.states has 1): each member"},
        {GoodWith("teachers { name: 'far' external {} }"),
         {},
         "teachers[0].prediction_servers: missing; the addresses of the servers that have this"},
        {GoodWith(kTeachers),
         {"teachers[3].prediction_servers[0].address=far"},
         "teachers[3].prediction_servers[0].address: wrong address (far); host:port"},
        {GoodWith(kTeachers),
         {"teachers[3].num_prediction_servers=2"},
         "teachers[3].num_prediction_servers: without meaning for an external teacher, whose "
         "servers are not the job's (2); prediction_servers alone"},
        {GoodWith(kTeachers),
         {"teachers[3].prediction_devices=cuda:0"},
         "teachers[3].prediction_devices: without meaning for an external teacher, whose servers "
         "are not the job's (cuda:0); none"},
        {GoodWith(kTeachers),
         {"teachers[0].prediction_devices=cuda:x"},
         "teachers[0].prediction_devices[0]: unknown device (cuda:x); cpu or cuda:N would be"},
        {GoodWith(kTeachers),
         {"teachers[3].external.inputs[0].input=y"},
         "teachers[3].external.inputs[0].input: is no input of the model (y); one of x would be"},
        {GoodWith(kTeachers),
         {"teachers[3].external.inputs[0].server="},
         "teachers[3].external.inputs[0].server: missing; the name of that input at the server"},
        {GoodWith(kTeachers),
         {"teachers[3].external.output="},
         "teachers[3].external.output: missing; the name of the server's output"},
        {GoodWith(kTeachers),
         {"codistillation.mode=CHECKPOINTS"},
         "codistillation.mode: workers cannot load the weights of external teachers themselves "
         "(CHECKPOINTS, with teachers[3] (far)); PREDICTIONS would be right"},
        {GoodWith(kFrozen),
         {"codistillation.mode=CHECKPOINTS", "codistillation.hedge_after_ms=20"},
         "codistillation.hedge_after_ms: without meaning in mode CHECKPOINTS, where nobody is"},
        {GoodWith(kFrozen),
         {"codistillation.mode=CHECKPOINTS", "codistillation.teacher_output=TOP_K"},
         "codistillation.teacher_output: without meaning in mode CHECKPOINTS"},
        {GoodWith(kFrozen),
         {"codistillation.mode=CHECKPOINTS", "codistillation.teacher_dtype=DT_HALF"},
         "codistillation.teacher_dtype: without meaning in mode CHECKPOINTS"},
        {CsvWith(kFrozen),
         {"codistillation.burn_in_steps=100"},
         "codistillation.burn_in_steps: no step would use a teacher (100)"},
    }));

TEST(TeacherRules, RegressionsHaveNoProbabilities) {
  JobConfig job = Good(CsvWith(kTeachers));
  job.mutable_model()->set_label_loss(SQUARED_ERROR);
  job.mutable_codistillation()->set_teacher_loss(CodistillationConfig::SQUARED_ERROR_LOGITS);
  job.mutable_teachers(3)->mutable_external()->set_kind(ExternalTeacher::PROBABILITIES);
  const std::string mistakes(ValidateJob(job).message());
  EXPECT_THAT(mistakes, HasSubstr("teachers[2].ensemble.average: a model of label_loss SQUARED_"));
  EXPECT_THAT(mistakes, HasSubstr("teachers[3].external.kind: a model of label_loss SQUARED_"));
}

TEST(TeacherRules, AcceptWhatIsGood) {
  EXPECT_THAT(Mistakes(GoodWith(kTeachers)), IsEmpty());
  EXPECT_THAT(Mistakes(GoodWith(kTeachers), {"codistillation.enabled=false"}), IsEmpty());
  EXPECT_THAT(Mistakes(CsvWith(kTeachers)), IsEmpty());
  // Frozen teachers are never stale: no rule on how often groups publish.
  EXPECT_THAT(Mistakes(CsvWith(kFrozen), {"codistillation.max_staleness_steps=1"}), IsEmpty());
  EXPECT_THAT(Mistakes(GoodWith(kFrozen), {"codistillation.mode=CHECKPOINTS"}), IsEmpty());
}

}  // namespace
}  // namespace codistill
