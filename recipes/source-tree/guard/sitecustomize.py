"""Loaded by every Python of a build of a source tree: no network, and no writes outside of the build's folders.

And a setup.py that asks which GPU there is gets the one that is built for: a build needs none.

Against mistakes and surprises of a setup.py, not against malice: programs that it starts are not watched. What was
refused is noted in GUARD_REPORT, for a setup.py may go on as if nothing had happened.
"""

# Paths are compared as the system sees them, before anything else is loaded.
# ruff: noqa: PTH100, PTH118, PTH119, PTH120, PTH123
import importlib.util
import os
import sys

_FOLDERS = tuple(os.path.realpath(folder) for folder in os.environ.get("GUARD_FOLDERS", "").split(":") if folder)
_CAPABILITY = tuple(int(part) for part in os.environ.get("GUARD_CAPABILITY", "").split(".") if part)
_REPORT = os.environ.get("GUARD_REPORT", "")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FREE = ("/dev/", "/proc/")
# Event -> which of its arguments are paths that are changed.
_CHANGES = {
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "shutil.rmtree": (0,),
}
_DOWNLOADERS = frozenset({"curl", "wget", "aria2c"})


def _note(kind, what):
    with open(_REPORT, "a", encoding="utf-8") as report:
        report.write(f"{kind} {what}\n")


def _check_write(path):
    if isinstance(path, int) or path is None:
        return
    text = os.fsdecode(path)
    # Not the target of a link that is replaced, but where the link lies.
    real = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(text))), os.path.basename(text))
    if real.startswith(_FREE) or any(real == folder or real.startswith(f"{folder}/") for folder in _FOLDERS):
        return
    _note("write", real)
    raise PermissionError(13, "a build writes nowhere but into its own folders", text)


def _check_network(host):
    _note("network", host)
    raise ConnectionRefusedError(111, f"a build has no network, and {host} was asked for")


def _is_relative_to_a_folder(arguments):
    """Whether the path is below a folder that is open (dir_fd, which comes last): that was checked when it was made."""
    return isinstance(arguments[-1], int) and len(arguments) > 1 and arguments[-1] >= 0 and arguments[-1] < 1 << 16


def _watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & _WRITING if isinstance(flags, int) else set(mode or "") & set("wax+"):
            _check_write(path)
    elif event in _CHANGES and not _is_relative_to_a_folder(arguments):
        for number in _CHANGES[event]:
            _check_write(arguments[number])
    elif event == "urllib.Request" and "://" in str(arguments[0]) and not str(arguments[0]).startswith("file:"):
        # By its name, before a proxy stands in for it.
        _check_network(str(arguments[0]).split("://", 1)[1].split("/", 1)[0])
    elif event == "socket.getaddrinfo":
        _check_network(arguments[0])
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        _check_network(arguments[1][0])
    elif event == "subprocess.Popen":
        command = arguments[0] or (arguments[1] or [""])[0]
        if os.path.basename(os.fsdecode(command)) in _DOWNLOADERS:
            _check_network(next((str(word) for word in arguments[1] if "://" in str(word)), os.fsdecode(command)))


class _GpuFinder:
    """Finds torch.cuda as it is found without this, and lets it tell of the GPU that is built for."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.is_available = lambda: True
            module.get_device_capability = lambda device=None: _CAPABILITY

        spec.loader.exec_module = exec_module
        return spec


if _REPORT and _FOLDERS:
    sys.addaudithook(_watch)
if _CAPABILITY:
    sys.meta_path.insert(0, _GpuFinder)
