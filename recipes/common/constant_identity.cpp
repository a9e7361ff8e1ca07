// Loaded (LD_PRELOAD) into cicc and cudafe++, which name what is local to a file after their process number, the times
// of the file, and its whole path.
#include <dlfcn.h>
#include <string.h>
#include <sys/stat.h>

extern "C" int getpid() { return 1; }

extern "C" char *getcwd(char *buffer, size_t size) {
    static const char here[] = "/proc/self/cwd";
    if (buffer == nullptr) {
        return strdup(here);
    }
    return size < sizeof here ? nullptr : strcpy(buffer, here);
}

// What stat() was before glibc 2.33, and what the toolkit is linked against.
extern "C" int __xstat(int version, const char *path, struct stat *found) {
    static auto real = reinterpret_cast<int (*)(int, const char *, struct stat *)>(dlsym(RTLD_NEXT, "__xstat"));
    int failed = real(version, path, found);
    if (failed == 0) {
        found->st_atim = found->st_mtim = found->st_ctim = timespec();
    }
    return failed;
}
