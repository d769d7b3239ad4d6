#ifndef CODISTILL_COMMON_DAEMON_VERSION_H_
#define CODISTILL_COMMON_DAEMON_VERSION_H_

namespace codistill {

// Of the software: shown by --version, in DaemonStatus and on status pages.
inline constexpr char kVersion[] = "0.1.0";

}  // namespace codistill

#endif  // CODISTILL_COMMON_DAEMON_VERSION_H_
