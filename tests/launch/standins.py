"""Stand-ins for commands, put in front of PATH: they record their calls and play along."""

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Workers are folders: FOLDER/NODE/INDEX is the home directory of worker INDEX of that TPU VM.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys

arguments = sys.argv[1:]
flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
words = [a for a in arguments if not a.startswith("--")]
folder = pathlib.Path(os.environ["STANDIN_FOLDER"])
if words[0] == "storage":  # cp - gs://BUCKET/FILE, and rm and ls of such a path
    absent = folder / "absent"
    if words[1] == "ls" and absent.exists() and absent.read_text() == words[2]:
        sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    bucket = words[-1].split("/")[2]
    sys.exit(f"ERROR: 403 no storage.objects.create in {bucket}" if bucket == "locked" else 0)
kind, verb = words[2:4]
fails = folder / f"{verb}_fails"
if fails.exists():
    times, message = fails.read_text().split("\\n")
    fails.write_text(f"{int(times) - 1}\\n{message}")
    if int(times) > 0:
        sys.exit(message)
if verb in ("describe", "create", "delete"):
    answer = folder / f"{kind}-{words[4]}.json"
    error = f"ERROR: (gcloud.compute.tpus.{kind}.{verb})"
if verb == "describe":
    if not answer.exists():
        sys.exit(f"{error} NOT_FOUND: Resource not found")
    print(answer.read_text())
    # A queued resource that waits is, at the next look, what the first line of FOLDER/waits says.
    print_later = folder / "waits"
    if kind == "queued-resources" and print_later.exists():
        made = json.loads(answer.read_text())
        if made["state"]["state"] == "WAITING_FOR_RESOURCES":
            first, *more = print_later.read_text().splitlines()
            print_later.write_text("\\n".join(more)) if more else print_later.unlink()
            made["state"]["state"] = first
            answer.write_text(json.dumps(made))
    sys.exit(0)
lost = folder / f"{verb}_answer_is_lost"

def end():
    if lost.exists():
        lost.unlink()
        sys.exit(f"{error} UNAVAILABLE: 503 backend error")
    sys.exit(0)

if verb == "create":
    refusals = folder / "create_refuses"
    if refusals.exists():
        first, *more = refusals.read_text().splitlines()
        refusals.write_text("\\n".join(more)) if more else refusals.unlink()
        sys.exit(f"{error} {first}")
    if answer.exists():
        sys.exit(f"{error} ALREADY_EXISTS: Resource already exists")
    if "node-count" in flags:
        count, prefix = int(flags["node-count"]), flags["node-prefix"]
        nodes = [f"{prefix}-{i}" for i in range(count)]
        spec = {"multisliceParams": {"nodeCount": count, "nodeIdPrefix": prefix}}
    else:
        nodes, spec = [flags["node-id"]], {"nodeId": flags["node-id"]}
    state = "WAITING_FOR_RESOURCES" if (folder / "waits").exists() else "ACTIVE"
    answer.write_text(json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": [spec]}}))
    workers = max(1, int(flags["accelerator-type"].split("-")[1]) // 4)
    for node in nodes:
        for worker in range(workers):
            (folder / node / str(worker)).mkdir(parents=True)
        about = {"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.1"}] * workers}
        about["acceleratorType"] = flags["accelerator-type"]
        (folder / f"tpu-vm-{node}.json").write_text(json.dumps(about))
    end()
if verb == "delete":
    if not answer.exists():
        sys.exit(f"{error} NOT_FOUND: Resource not found")
    answer.unlink()
    if kind == "queued-resources" and "--force" not in arguments:
        sys.exit(f"{error} FAILED_PRECONDITION: it still has nodes; use --force")
    for machine in folder.glob(f"tpu-vm-{words[4]}*.json"):
        machine.unlink()
        shutil.rmtree(folder / machine.stem[len("tpu-vm-"):])
    end()
node = words[5].split(":")[0] if verb == "scp" else words[4]
workers = sorted(p for p in (folder / node).iterdir() if flags["worker"] in ("all", p.name))
assert workers, f"no worker {flags['worker']} of {node}"
# ssh takes nothing of the laptop's environment along.
left = ("TPU_NAME", "ZONE", "PROJECT")
there = {name: value for name, value in os.environ.items() if name not in left}
status = 0

def ssh(home, command, out, err):
    # The status of ssh. HOME/known: the host key is known. HOME/unreachable: there is no
    # connection. HOME/breaks: a command with these words is refused a connection, which then breaks
    # after it, so that it is run twice.
    if (home / "unreachable").exists():
        err.write("ssh: connect to host 10.0.0.1 port 22: Connection timed out\\n" * 10)
        return 255
    if not (home / "known").exists():
        err.write("Warning: Permanently added '10.0.0.1' (ED25519) to the list of known hosts.\\n")
        (home / "known").touch()
    broken = (home / "breaks").exists() and (home / "breaks").read_text() in command
    if broken:
        err.write("ssh: connect to host 10.0.0.1 port 22: Connection refused\\n")
    for breaks in (True, False) if broken else (False,):
        err.flush()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=home, env=there | {"HOME": str(home)}, stdout=out, stderr=err,
        )
        if breaks:
            (home / "breaks").unlink()
            err.write("client_loop: send disconnect: Broken pipe\\n")
    return done.returncode

for home in workers:
    if verb == "scp" and (home / "unreachable").exists():
        status = 255
        continue
    if verb == "scp":
        shutil.copy(words[4], home / words[5].split(":")[1])
        continue
    drops = home / "drop_connections"
    if "follow" in flags["command"] and drops.exists() and int(drops.read_text()) > 0:
        drops.write_text(str(int(drops.read_text()) - 1))
        sys.exit(255)
    if "output-directory" in flags:
        # Like gcloud 528: the folder has to exist, and is not the one that is written to.
        assert pathlib.Path(flags["output-directory"]).is_dir()
        with open(f"None/{home.name}.log", "w") as out:
            ended = ssh(home, flags["command"], out, out)
    else:
        ended = ssh(home, flags["command"], sys.stdout, sys.stderr)
    status = status or ended
sys.exit(status)
"""

# A cluster with one namespace. FOLDER/applied.yaml is its JobSet; every look at it takes one line
# of FOLDER/states, and the last one stays. FOLDER/pending is how often the first host's pod is not
# ready yet, FOLDER/events why; FOLDER/failed_pods are the names of pods that failed.
KUBECTL = """
import json, os, pathlib, re, sys

folder = pathlib.Path(os.environ["STANDIN_FOLDER"])
applied, states, pending = folder / "applied.yaml", folder / "states", folder / "pending"
verb, *rest = sys.argv[1:]

def spec(text):
    return re.search('saber-jax/spec: "(.*)"', text)[1]

def lines(name):
    return (folder / name).read_text() if (folder / name).exists() else ""

if verb == "apply":
    wanted = sys.stdin.read()
    if applied.exists() and spec(wanted) != spec(applied.read_text()):
        sys.exit('The JobSet "saber" is invalid: spec.replicatedJobs: field is immutable')
    applied.write_text(wanted)
elif verb == "delete":
    if not applied.exists():
        sys.exit('Error from server (NotFound): jobsets.jobset.x-k8s.io "saber" not found')
    applied.unlink()
elif verb == "get" and rest[0] == "jobset":
    if (folder / "forbidden").exists():
        sys.exit('Error from server (Forbidden): jobsets.jobset.x-k8s.io "saber" is forbidden')
    if not applied.exists():
        sys.exit('Error from server (NotFound): jobsets.jobset.x-k8s.io "saber" not found')
    if states.read_text().startswith("unavailable\\n"):
        states.write_text(states.read_text().partition("\\n")[2])
        sys.exit("Unable to connect to the server: net/http: TLS handshake timeout")
    first, *rest = states.read_text().split("\\n")
    if rest:
        states.write_text("\\n".join(rest))
    annotations = {"saber-jax/spec": spec(applied.read_text())}
    status = {"terminalState": first} if first else {}
    print(json.dumps({"metadata": {"name": "saber", "annotations": annotations}, "status": status}))
elif verb == "get" and rest[0] == "events":
    print(lines("events"))
elif verb == "get" and rest[0] == "pods":
    print(lines("failed_pods"))
elif verb == "wait" and pending.exists() and int(pending.read_text()) > 0:
    pending.write_text(str(int(pending.read_text()) - 1))
    sys.exit("error: timed out waiting for the condition on pods/saber-slice-0-0-x7k2p")
elif verb == "logs":
    print("the first host speaks" if "--follow" in rest else f"{rest[0]}: out of memory")
"""

# Mounts a bucket as far as anybody here can see: the folder is there, `mountpoint` knows it.
GCSFUSE = """
import os, pathlib, sys

bucket, folder = sys.argv[-2:]
if bucket == "locked":
    sys.exit("Error: 403 Forbidden")
with open(pathlib.Path(os.environ["STANDIN_FOLDER"]) / "mounted", "a") as mounted:
    mounted.write(folder + "\\n")
"""
MOUNTPOINT = """
import os, pathlib, sys

mounted = pathlib.Path(os.environ["STANDIN_FOLDER"]) / "mounted"
sys.exit(not mounted.exists() or sys.argv[-1] not in mounted.read_text().splitlines())
"""

# A worker's disk, whatever the machine that runs the tests has: HOME/free_gib are free, or 100.
DF = """
import os, pathlib

free = pathlib.Path(os.environ["HOME"]) / "free_gib"
print("Avail", (int(free.read_text()) if free.exists() else 100) * 2**20, sep="\\n")
"""

# Stands where the project's interpreter would: `-m launch.chain ...` ends as HOME/ends_with says.
# With FOLDER/taken_back, the TPU VM that it runs on is taken back under it, once.
PYTHON = """
import json, os, pathlib, signal, sys, time

def take_back(folder, name):
    (folder / "taken_back").unlink()
    for kind, state in (("queued-resources", {"state": "SUSPENDED"}), ("tpu-vm", "PREEMPTED")):
        path = folder / f"{kind}-{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"state": state}))

if sys.argv[1] == "-m" and sys.argv[2] == "launch.chain":
    home = pathlib.Path(os.environ["HOME"])
    signal.signal(signal.SIGTERM, lambda *_: (print("saving", flush=True), os._exit(75)))
    print("chain with", *sys.argv[3:], flush=True)
    folder = pathlib.Path(os.environ["STANDIN_FOLDER"])
    if home.name == "0" and (folder / "taken_back").exists():
        take_back(folder, home.parent.name)
        sys.exit(75)
    while (home / "goes_on").exists():
        time.sleep(0.05)
    sys.exit(int((home / "ends_with").read_text()) if (home / "ends_with").exists() else 0)
"""


class Standins:
    """A folder of stand-ins, and the calls that they saw."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._bin, self._calls = folder / "bin", folder / "calls.jsonl"
        self._bin.mkdir(parents=True)

    def add(self, name: str, code: str) -> Path:
        record = f"""
            import json, sys
            with open({str(self._calls)!r}, "a") as f:
                f.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
        """
        path = self._bin / name
        path.write_text(f"#!{sys.executable} -S\n{textwrap.dedent(record)}\n{code}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def environ(self, **more: str) -> dict[str, str]:
        # No TPU here, whatever the machine that runs the tests has.
        (self.folder / "sys").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if k not in ("TPU_NAME", "GKE_IMAGE")}
        return kept | {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "STANDIN_FOLDER": str(self.folder),
            "SYSFS": str(self.folder / "sys"),
            "RECONNECT_SECONDS": "0.1",
            "TAKEN_BACK_SECONDS": "0.2",
            **more,
        }

    def calls(self, *start: str) -> list[list[str]]:
        """Calls that begin with `start`."""
        if not self._calls.exists():
            return []
        lines = [json.loads(line) for line in self._calls.read_text().splitlines()]
        return [line for line in lines if line[: len(start)] == list(start)]

    def run(
        self, *command: str, seconds: float = 60, **environ: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environ(**environ),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
