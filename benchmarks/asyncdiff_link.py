"""What sending only the needed tensors, while computing, saves on a slow link: AsyncDiff's ranks on two machines.

    python benchmarks/asyncdiff_link.py --full --rate 250mbit        # Linux; seven minutes on two idle cores
    python benchmarks/asyncdiff_link.py --short

Between processes of one machine messages cost next to nothing, whatever they are. So this runs in a network namespace
of its own (`unshare`), whose loopback link `tc` limits to `--rate`, and samples with the UNet of `asyncdiff_speed.py`.
A CPU computes a step some 50 times slower than a GPU does: 250 Mbit/s here stand for about 10 Gbit/s there.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import asyncdiff_speed as speed
from matplotlib.figure import Figure
from report import Report, begin_parsed, make_parser
from team_timing import Runs, Teams, Way, time_in_turn

from diffusers_ext.asyncdiff import AsyncDiffConfig, stages_from_original


INSIDE = "DIFFUSERS_EXT_LIMITED_LINK"  # set in the namespace to the rate
RATE, BURST, LATENCY = "250mbit", "256kb", "400ms"  # of tc's token bucket; latency: what it may queue
ROUNDS, SHORT_ROUNDS = 3, 2
NEEDED_BLOCKING = "N=2, authors' split, needed tensors, blocking"


def main(argv: Sequence[str] | None = None) -> None:
    logging.getLogger("diffusers_ext").setLevel(logging.ERROR)
    parser = make_parser(__doc__)
    parser.add_argument("--rate", default=RATE, help=f"of the link, as tc takes it; default {RATE}")
    args = parser.parse_args(argv)
    if os.environ.get(INSIDE) != args.rate:
        enter_namespace(args.rate, sys.argv[1:] if argv is None else list(argv))
        return
    widths = speed.SHORT_WIDTHS if args.short else speed.WIDTHS
    steps, rounds = (speed.SHORT_STEPS, SHORT_ROUNDS) if args.short else (speed.STEPS, ROUNDS)
    out = begin_parsed(args, "asyncdiff_link", rate=args.rate, widths=widths, latents=speed.SIZE, steps=steps)
    with Teams() as teams:
        runs = time_in_turn(out, teams, "unet", speed.unet_sizes(widths), ways(), steps, rounds)
    report(out, runs, steps, rounds, args.rate)
    out.finish()


def ways() -> dict[str, Way]:
    authors = stages_from_original("sd15", 2)
    return {
        speed.PLAIN: Way(),
        speed.DEFAULT: Way(AsyncDiffConfig(), 2),
        speed.AUTHORS: Way(AsyncDiffConfig(stages=authors), 2),
        NEEDED_BLOCKING: Way(AsyncDiffConfig(stages=authors, overlap=False), 2),
        speed.RELEASED: Way(AsyncDiffConfig(stages=authors, transport="all", overlap=False), 2),
    }


def enter_namespace(rate: str, arguments: Sequence[str]) -> None:
    """Run this script again in a network namespace with a slow loopback link; ends as it does.

    Raises:
        SystemExit: the tools are missing, or the system does not allow it.
    """
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"Needs {', '.join(missing)} (util-linux and iproute2, on Linux).")
    limit = f"ip link set lo up mtu 9000 && tc qdisc add dev lo root tbf rate {rate} burst {BURST} latency {LATENCY}"
    environment = {**os.environ, INSIDE: rate, "GLOO_SOCKET_IFNAME": "lo"}
    command = ["unshare", "--map-root-user", "--net", "sh", "-c", f'{limit} && exec "$@"', "sh"]
    code = subprocess.run([*command, sys.executable, __file__, *arguments], env=environment).returncode
    if code:
        raise SystemExit(code)


def report(out: Report, runs: Runs, steps: int, rounds: int, rate: str) -> None:
    timings = runs.timings
    rows = [
        [
            name,
            f"{timings.median(name):.2f} s",
            f"{timings.ratio(speed.PLAIN, name)}",
            f"{timings.ratio(name, speed.RELEASED)}",
            f"{runs.sent(name) / steps / 1e6:.2f} MB",
        ]
        for name in ways()
    ]
    note = f"median (quartiles) of {rounds} runs of {steps} calls over a link of {rate}"
    columns = ["way", "time of a run", "speed-up", "time over all outputs, blocking", "sent per call"]
    out.table(columns, rows, note=note)
    ratio = timings.ratio(speed.AUTHORS, speed.RELEASED)
    met = "met" if ratio.median <= 0.8 else "**not met**"
    out.text(f"- needed tensors while computing, over all outputs and waiting, same split: {ratio}; aim 0.8: {met}")
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    names = list(ways())
    axes.barh(names, [timings.median(name) for name in names], color=["0.65", "C0", "C0", "C1", "C3"])
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds a run, {rate} link")
    axes.grid(axis="x", alpha=0.3)
    out.plot(figure)


if __name__ == "__main__":
    main()
