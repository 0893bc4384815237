"""A campaign on a GPU that is ours for minutes: python benches/campaign.py --go 1|2|3 --out DIR

Works from a plain source tree, without a network. Every go and every step has its seconds and leaves its figures as it
goes; what was done is not done again when the same folder (or a copy of it, --resume) is given to the next go. Nothing
but the standard library is needed to start it. benches/README.md says what the steps and files are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import goes
import peers
from steps import Log, Runner, State, Step, load, save

FILES = (
    "campaign.json", "campaign.log", "summary.md", "quick-1.csv", "quick-2.csv", "quick-3.csv", "roofline.png",
    "ratios.png",
)  # fmt: skip


def main() -> int:
    """0: nothing failed; 1: something did, and is named; 2: bad arguments."""
    options = _options()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.resume is not None and not (out / "campaign.json").exists():  # the second start has its own
        for name in FILES:
            if (options.resume / name).exists():
                shutil.copyfile(options.resume / name, out / name)
    states = load(out)
    plan = goes.Plan(
        out, options.scratch, options.peers, options.objects, options.dry_run, goes.red_tests(states), _cores()
    )
    groups = goes.steps(options.go, plan)
    names = [step.name for group in groups for step in group]
    unknown = [name for name in (*options.steps, *options.again) if name not in names]
    if unknown:
        print(f"campaign: go {options.go} has the steps {','.join(names)}, got {','.join(unknown)}", file=sys.stderr)
        return 2
    log = Log(out / "campaign.log")
    runner = Runner(goes.ROOT, _environment(options, plan), log, time.monotonic() + options.seconds)

    signal.signal(signal.SIGTERM, lambda *_: runner.abort())  # the machine is taken back: say what was done

    def ended(step: Step, state: State) -> None:
        states[f"{options.go} {step.name}"] = state
        print(f"{step.name}: {state.status} {state.reason} ({state.seconds:.0f} s)", flush=True)
        save(out, states)

    try:
        for group in groups:
            todo = []
            for step in group:
                before = states.get(f"{options.go} {step.name}")
                if options.steps and step.name not in options.steps:
                    continue
                if (
                    before is None
                    or before.status not in ("done", "failed")
                    or step.always
                    or step.name in options.again
                ):
                    todo.append(step)
                else:
                    print(f"{step.name}: {before.status} earlier in this go")
            runner.side_by_side(todo, ended)
    finally:
        log.close()
    mine = {name.split(" ", 1)[1]: s for name, s in states.items() if name.startswith(f"{options.go} ")}
    wrong = [name for name, state in mine.items() if state.status == "failed"]
    cut = [name for name, state in mine.items() if state.status == "cut"]
    print(f"go {options.go}, {out}: failed {wrong or 'nothing'}, to be continued {cut or 'nothing'}")
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("campaign", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    names = {"type": lambda text: text.split(","), "default": []}
    add("--go", type=int, choices=sorted(goes.SECONDS), required=True, help="which of the three")
    add("--out", type=Path, required=True, help=f"folder for everything: at most {len(FILES)} files")
    add("--resume", type=Path, help="an earlier go's folder, if it is not --out itself")
    add("--seconds", type=float, help=f"of this go; default {goes.SECONDS}")
    add("--peers", type=Path, help="bundle of peers to unpack (benches/README.md)")
    add("--objects", type=Path, help="kernels compiled before, by csrc/build_cuda.py --save")
    add("--scratch", type=Path, default=Path("/tmp/pagewire-campaign"), help="unpacked peers, Triton's cache")
    add("--steps", **names, help="only these steps")
    add("--again", **names, help="repeat these finished steps")
    add("--commit", default="", help="what the CSV says where there is no git")
    add("--dry-run", action="store_true", help="every step at its smallest, on a CPU; nothing is built")
    options = parser.parse_args()
    longer = goes.DRY if options.dry_run else 1
    options.seconds = options.seconds or longer * goes.SECONDS[options.go]
    if options.resume is not None and not (options.resume / "campaign.json").exists():
        parser.error(f"--resume: expected the folder of an earlier go, got {options.resume} without a campaign.json")
    for name in ("out", "resume", "peers", "objects", "scratch"):  # the steps run in the source tree
        given = getattr(options, name)
        setattr(options, name, given.resolve() if given is not None else None)
    return options


def _environment(options: argparse.Namespace, plan: goes.Plan) -> dict[str, str]:
    """The source tree first, then the unpacked peers, whether this go unpacks them or an earlier one did."""
    ours = [str(goes.ROOT / "python"), str(goes.ROOT / "benches")]
    paths = [*ours, str(plan.site), os.environ.get("PYTHONPATH", "")]
    added = {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(plan.scratch / "triton"),
        "PAGEWIRE_BUILD_JOBS": str(plan.cores),
    }
    if options.commit:
        added["PAGEWIRE_COMMIT"] = options.commit
    if plan.peers is not None:
        added |= peers.environment(plan.peers, plan.site)
    return {**os.environ, **added}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
