"""The command line: reads flags, calls the API, prints. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from headstart.errors import DataError, HeadstartError, Problem, UsageError
from headstart.files import json_text

if TYPE_CHECKING:
    from headstart.config import Config, Override
    from headstart.display import Display

app = typer.Typer(
    name="headstart",
    help="Fine-tune a language model and prove that it got better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take a third of a second to draw the help
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="List built-in models and what is cached.", invoke_without_command=True)
config_app = typer.Typer(help="Print the settings or their schema.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")

Data = Annotated[list[str], typer.Argument(help="Files, folders or hub:owner/name.", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", "-m", help="A built-in name, folder, .gguf, hub id or run.")]
Kind = Annotated[str | None, typer.Option(help="unsupervised, supervised, instruction or preference.")]
Method = Annotated[str | None, typer.Option(help="lora (an adapter) or full (every weight).")]
Out = Annotated[str | None, typer.Option("--out", "-o", help="The run folder.")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of settings.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Any setting.")]
Epochs = Annotated[float | None, typer.Option(help="Times that each row is seen.")]
EvalData = Annotated[list[str] | None, typer.Option(help="Rows to score on; else a part is held out.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Graders = Annotated[list[str] | None, typer.Option("--grader", metavar="FILE", help="A grader file; repeatable.")]
Track = Annotated[
    list[str] | None,
    typer.Option(metavar="NAMES", help="Trackers that follow it: tensorboard, wandb, mlflow, trackio."),
]
Answers = Annotated[int, typer.Option(help="Rows that are answered and scored as text.")]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # what these can't spell, in some locales, is spelled out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"headstart {version('headstart')}")
        raise typer.Exit


@app.callback()
def _whole(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- verbs ---


@app.command()
def tune(
    data: Data,
    model: Model = None,
    kind: Kind = None,
    method: Method = None,
    out: Out = None,
    config: File = None,
    sets: Sets = None,
    epochs: Epochs = None,
    eval_data: EvalData = None,
    track: Track = None,
    lr: Annotated[str | None, typer.Option("--lr", help="Peak learning rate; auto tries several and chooses.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Run it with so many seeds, to see how much is luck.")] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune on DATA and prove the gain."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.tune import start

        flags = {**_flags(data, model, kind, method, out, epochs, eval_data), "optim.lr": lr}
        if seeds is not None:
            from headstart.trials.seeds import say_seeds, tune_seeds

            if track:
                raise UsageError(Problem("usage.flag", "--track follows one run", "--seeds", "leave one of them out"))
            found = tune_seeds(read_config(config, sets, flags), seeds, display)
            say_seeds(display, found)
            return found.to_json()
        run = start(read_config(config, sets, flags), display, _names(track))
        return {"run": str(run.path), **run.result}

    carry_out(work, as_json)


@app.command()
def curve(
    data: Data,
    rows: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="On how many rows; else 10, 30, ..., all.")
    ] = None,
    scratch: Annotated[bool, typer.Option("--from-scratch", help="From random weights, too.")] = False,
    model: Model = None,
    kind: Kind = None,
    method: Method = None,
    out: Out = None,
    config: File = None,
    sets: Sets = None,
    epochs: Epochs = None,
    eval_data: EvalData = None,
    as_json: Json = False,
) -> None:
    """Draw how good a model gets with how many rows of DATA."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.trials.curve import curve_config, say_curve

        flags = _flags(data, model, kind, method, out, epochs, eval_data)
        counts = _whole_numbers(rows) if rows else None
        found = curve_config(read_config(config, sets, flags), counts, display, from_scratch=scratch)
        say_curve(display, found)
        return found.to_json()

    carry_out(work, as_json)


@app.command()
def sweep(
    data: Data,
    over: Annotated[list[str], typer.Option(metavar="KEY=A,B,C", help="A setting and what to try, or LOW..HIGH.")],
    trials: Annotated[int | None, typer.Option(min=1, help="Trials, drawn where there could be more.")] = None,
    budget: Annotated[float | None, typer.Option(help="The most training in all, in full runs.")] = None,
    model: Model = None,
    kind: Kind = None,
    method: Method = None,
    out: Out = None,
    config: File = None,
    sets: Sets = None,
    epochs: Epochs = None,
    eval_data: EvalData = None,
    as_json: Json = False,
) -> None:
    """Try settings, train the best on, and prove the last."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.trials.halving import parse_over
        from headstart.trials.sweep import say_swept, sweep_config

        flags = _flags(data, model, kind, method, out, epochs, eval_data)
        found = sweep_config(read_config(config, sets, flags), parse_over(over), trials, budget, display)
        say_swept(display, found)
        return found.to_json()

    carry_out(work, as_json)


@app.command()
def demo(out: Out = None, as_json: Json = False) -> None:
    """Show the main job on data of our own."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.demo.run import run_demo

        run = run_demo(display, out)
        return {"run": str(run.path), **run.result}

    carry_out(work, as_json)


@app.command()
def check(
    data: Data,
    model: Model = None,
    kind: Kind = None,
    config: File = None,
    sets: Sets = None,
    eval_data: EvalData = None,
    show: Annotated[int, typer.Option(help="Rows to print with their trained, context and cut tokens.")] = 0,
    fix: Annotated[bool, typer.Option("--fix", help="Write the rows of DATA without bad ones and duplicates.")] = False,
    near: Annotated[bool, typer.Option("--near", help="With --fix: without near duplicates too.")] = False,
    redact: Annotated[
        bool, typer.Option("--redact", help="With --fix: [EMAIL] and the like for what is private.")
    ] = False,
    grader: Graders = None,
    least: Annotated[
        float | None, typer.Option("--min", help="With --grader: the least score that a row's own answer needs.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="With --fix: the file to write, JSON lines.")] = None,
    as_json: Json = False,
) -> None:
    """Look through DATA; nothing is trained."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.show import say_findings, say_mended, say_rows
        from headstart.verbs import check_config, mend_config

        if fix != (out is not None) or (not fix and (near or redact or grader)):
            cure = "headstart check DATA --fix -o clean.jsonl"
            what = "--fix and -o go together; --near, --redact, --grader go with them"
            raise UsageError(Problem("usage.flag", what, "check", cure))
        if least is not None and not grader:
            raise UsageError(Problem("usage.flag", "--min goes with --grader", "check", "--grader FILE --min 0.5"))
        flags = {"data.train": data, "model": model, "kind": kind, "data.eval": eval_data}
        settings = read_config(config, sets, flags)
        findings, built = check_config(settings)
        say_findings(display, findings, built)
        say_rows(display, built, show)
        found = {**findings.to_json(), "ok": built.acceptable}
        if out is None:
            return found
        mended = mend_config(
            settings, built, out, near=near, private=redact, graders=grader or (), least=least, tell=display.warn
        )
        say_mended(display, mended)
        return {**found, "ok": True, "mended": mended.to_json()}

    if not carry_out(work, as_json)["ok"]:
        raise typer.Exit(DataError.exit_code)


@app.command()
def plan(
    data: Data,
    model: Model = None,
    kind: Kind = None,
    method: Method = None,
    config: File = None,
    sets: Sets = None,
    epochs: Epochs = None,
    eval_data: EvalData = None,
    as_json: Json = False,
) -> None:
    """Say what a run on DATA would take."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.show import say_plan
        from headstart.verbs import plan_config

        flags = _flags(data, model, kind, method, None, epochs, eval_data)
        job = plan_config(read_config(config, sets, flags), display)
        say_plan(display, job.plan())
        return job.plan()

    carry_out(work, as_json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    allow: Annotated[
        list[str] | None, typer.Option(help="Go on though it changed: data, model, settings, versions.")
    ] = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped or killed."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.tune import resume as resume_run

        finished = resume_run(run, display, _names(allow), _names(track))
        return {"run": str(finished.path), **finished.result}

    carry_out(work, as_json)


@app.command()
def track(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    to: Annotated[list[str], typer.Option(metavar="NAMES", help="tensorboard, wandb, mlflow, trackio.")],
    as_json: Json = False,
) -> None:
    """Send what a run wrote to trackers."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.track import send_all

        return {"run": str(run), "sent": send_all(run, _names(to), display)}

    carry_out(work, as_json)


@app.command()
def update(
    run: Annotated[str, typer.Argument(help="The run to go on from.")],
    data: Annotated[list[str], typer.Argument(help="New rows: files, folders or hub:owner/name.", show_default=False)],
    out: Out = None,
    replay: Annotated[
        float | None,
        typer.Option(help="Old rows learned again beside each new one; 0 is none.", show_default="0.3, of classes 1"),
    ] = None,
    epochs: Epochs = None,
    eval_data: EvalData = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Go on from RUN with new rows, and show what is kept."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.tune import start
        from headstart.update import update_config

        flags = {"data.train": data, "out": out, "epochs": epochs, "data.eval": eval_data}
        given = [*_parse_flags(flags), *_parse_sets(sets)]
        finished = start(update_config(run, replay, given), display)
        return {"run": str(finished.path), **finished.result}

    carry_out(work, as_json)


@app.command("verify-resume")
def verify(
    run: Annotated[Path, typer.Argument(help="The run folder; it is only read.")],
    steps: Annotated[int, typer.Option(min=4, help="Steps that are taken twice.")] = 6,
    as_json: Json = False,
) -> None:
    """Show that a run which is killed loses nothing."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.verify import say_verified, verify_resume

        display.title("untouched, and killed again and again")
        found = verify_resume(run, display, steps)
        say_verified(display, found)
        return found.to_json()

    if not carry_out(work, as_json)["same"]:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a folder, a built-in name or a hub id.")],
    data: Data,
    answers: Answers = 32,
    grader: Graders = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="A folder for every prediction; one that was begun goes on.")
    ] = None,
    robust: Annotated[bool, typer.Option("--robust", help="Score rows that are written otherwise, too.")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Score a model on DATA."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.show import say_evaluated
        from headstart.verbs import evaluate as evaluate_model

        found = evaluate_model(
            model,
            data,
            answers=answers,
            graders=grader or (),
            out=out,
            robust=robust,
            settings=read_sets(sets),
            on_progress=display.progress,
        )
        say_evaluated(display, found)
        if out:
            display.fact("predictions", str(Path(out) / "predictions.parquet"))
        return found.to_json()

    carry_out(work, as_json)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A run, a folder or a hub id: a classifier.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: JSON lines.")],
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Label the rows of DATA."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.label import predict as predict_rows

        rows = predict_rows(model, data, out, settings=read_sets(sets), on_progress=display.progress)
        display.end_progress()
        display.line(f"{rows:,} rows labelled: {out}")
        return {"rows": rows, "out": str(out)}

    carry_out(work, as_json)


@app.command()
def compare(
    names: Annotated[
        list[str],
        typer.Argument(help="Two models or more, and the data; or a run.", metavar="A B [C...] DATA... | RUN"),
    ],
    answers: Answers = 32,
    grader: Graders = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A page to write: compare.html.")] = None,
    sets: Sets = None,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train RUN's network from random weights, beside it; -o is a folder.")
    ] = False,
    price: Annotated[float | None, typer.Option(min=0, help="With --from-scratch: what an hour costs.")] = None,
    reach: Annotated[
        list[float] | None, typer.Option(help="With --from-scratch: a loss to look for; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score models on the same DATA, each in pairs with A."""
    if scratch:
        carry_out(lambda display: _compare_scratch(display, names, grader, out, price, reach, sets), as_json)
        return

    def work(display: Display) -> dict[str, Any]:
        from headstart.files import write_atomic
        from headstart.report.versus import versus_page
        from headstart.show import say_versus
        from headstart.verbs import compare as compare_models
        from headstart.verbs import split_names

        if price is not None or reach:
            cure = "headstart compare --from-scratch RUN --price 0.40"
            raise UsageError(Problem("usage.flag", "--price and --reach go with --from-scratch", "compare", cure))
        if out is not None and (out.suffix != ".html" or out.is_dir()):
            raise UsageError(Problem("usage.flag", f"{out} is no name for a page", "--out", "-o compare.html"))
        (a, b, *more), data = split_names(names)
        found = compare_models(
            a,
            b,
            data,
            more=more,
            answers=answers,
            graders=grader or (),
            settings=read_sets(sets),
            on_progress=display.progress,
        )
        say_versus(display, found)
        if out is not None:
            write_atomic(out, versus_page(found))
            display.fact("page", str(out))
        return found.to_json()

    carry_out(work, as_json)


def _compare_scratch(
    display: Display,
    names: list[str],
    grader: list[str] | None,
    out: Path | None,
    price: float | None,
    reach: list[float] | None,
    sets: list[str] | None,
) -> dict[str, Any]:
    from headstart.trials.scratch import compare_scratch, say_scratch

    if len(names) != 1 or grader:
        what = f"{len(names)} names{' and graders' * bool(grader)}: one run is compared with its network from random weights"
        raise UsageError(Problem("usage.flag", what, "--from-scratch", "headstart compare --from-scratch RUN"))
    place = None if out is None else str(out)
    settings = read_sets(sets)
    found = compare_scratch(names[0], display, out=place, price=price, reach=reach or (), settings=settings)
    say_scratch(display, found)
    return found.to_json()


@app.command()
def benchmark(
    models: Annotated[list[str], typer.Argument(help="Models; each further one is held against the first.")],
    tasks: Annotated[list[str], typer.Option(metavar="NAMES", help="Tasks of lm-evaluation-harness: arc_easy, ...")],
    include: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, in the harness's form.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most documents of a task.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in front of each prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for all predictions; one that was begun goes on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score models on public benchmarks."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.benchmark import Asking, benchmark, say_benchmarks, to_json

        asking = Asking(_names(tasks), include, limit, shots, chat)
        found = benchmark(models, asking, out, display.progress)
        say_benchmarks(display, found)
        return to_json(found)

    carry_out(work, as_json)


@app.command()
def strength(
    run: Annotated[str, typer.Argument(help="A run that learned to write text.")],
    data: Annotated[list[str] | None, typer.Argument(help="Rows to score on; else its held-out ones.")] = None,
    at: Annotated[float | None, typer.Option(help="Write the model at this strength, from 0 to 1, to -o.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A page to write; with --at a folder.")] = None,
    as_json: Json = False,
) -> None:
    """Score RUN with less and more of what it learned."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.files import write_atomic
        from headstart.report.strength import strength_page
        from headstart.show import say_strengths
        from headstart.strength import measure_strengths, write_at

        if at is not None:
            if out is None or data:
                cure = "headstart strength RUN --at 0.5 -o FOLDER"
                raise UsageError(Problem("usage.flag", "--at goes with -o, and with no data", "strength", cure))
            display.fact("model", str(write_at(run, at, out)))
            return {"run": run, "strength": at, "model": str(out)}
        if out is not None and (out.suffix != ".html" or out.is_dir()):
            raise UsageError(Problem("usage.flag", f"{out} is no name for a page", "--out", "-o strength.html"))
        found = measure_strengths(run, data or (), on_progress=display.progress).to_json()
        say_strengths(display, found)
        if out is not None:
            write_atomic(out, strength_page(found))
            display.fact("page", str(out))
        return found

    carry_out(work, as_json)


@app.command()
def chat(
    names: Annotated[list[str], typer.Argument(help="A run, a folder, a built-in name or a hub id.", metavar="MODEL")],
    ask: Annotated[str | None, typer.Option(help="Ask this once and leave, instead of a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Two models answer; vote without knowing whose is whose.")
    ] = False,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="With --compare: what is asked.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --compare: where votes go, to train on; else votes.jsonl.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk to a model, or vote between two."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.chat import Chat, talk

        how = {"system": system, "max_tokens": max_tokens, "temperature": temperature}
        live = not as_json and sys.stdin.isatty()
        if (compare and ask is not None) or (not compare and out is not None):
            what = "--ask is for one model" if compare else "-o goes with --compare"
            raise UsageError(Problem("usage.flag", what, "chat", "leave it out"))
        if compare:
            from headstart.vote import hold_vote

            return hold_vote(names, display, out or Path("votes.jsonl"), prompts, live=live, **how)
        if len(names) != 1 or prompts:
            what = f"{len(names)} models are named" if len(names) != 1 else "--prompts goes with --compare"
            raise UsageError(Problem("usage.flag", what, "chat", "headstart chat MODEL, or chat A B --compare"))
        talker = Chat(names[0], system=system, max_tokens=max_tokens, temperature=temperature)
        if ask is not None:
            show = None if as_json else display.stream
            answer = talker.answer(ask, show)
            return {"model": names[0], "asked": ask, "answer": answer.text, "stopped": answer.stopped}
        if not live:
            raise UsageError(Problem("usage.flag", "a conversation needs a terminal", "chat", "ask once: --ask TEXT"))
        talk(talker, display)
        return {}

    carry_out(work, as_json)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where runs lie.")] = Path("runs"),
    tree: Annotated[bool, typer.Option("--tree", help="Each below the run that it goes on from.")] = False,
    as_json: Json = False,
) -> None:
    """List the runs of a folder."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.show import grow_tree, list_runs, say_runs

        found = list_runs(folder)
        found = grow_tree(found) if tree else found
        say_runs(display, found, folder)
        return {"runs": found}

    carry_out(work, as_json)


@models_app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the built-in models and what is cached."""
    if context.invoked_subcommand is not None:
        return

    def work(display: Display) -> dict[str, Any]:
        from headstart.show import list_models, say_models

        found = list_models()
        say_models(display, found)
        return {"models": found}

    carry_out(work, as_json)


@models_app.command()
def pull(name: Annotated[str, typer.Argument(help="A built-in name or a hub id.")], as_json: Json = False) -> None:
    """Fetch a model and say where it lies."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.models.source import find_model, weights_hash

        source = find_model(name)
        digest = weights_hash(source)
        for key, value in (("path", str(source.path)), ("sha256", digest), ("license", source.license or "unknown")):
            display.fact(key, value)
        return {"name": name, "path": str(source.path), "sha256": digest, "license": source.license}

    carry_out(work, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look for problems of this machine."""

    def work(display: Display) -> dict[str, Any]:
        from headstart.doctor import examine, say_examined

        found = examine()
        say_examined(display, found)
        return found

    if not carry_out(work, as_json)["ok"]:
        raise typer.Exit(1)


@config_app.command()
def schema(as_json: Json = True) -> None:  # noqa: ARG001 (a schema is JSON, with the flag and without)
    """Print the JSON schema of the settings."""
    from headstart.config import Settings

    print(json.dumps(Settings.model_json_schema(), indent=2))


@config_app.command()
def render(config: File = None, sets: Sets = None, as_json: Json = False) -> None:
    """Print every setting and where it comes from."""

    def work(_: Display) -> dict[str, Any]:
        chosen = read_config(config, sets, {})
        if not as_json:
            print(chosen.render(), end="")
        return {"settings": chosen.settings.model_dump(mode="json"), "sources": dict(chosen.sources)}

    carry_out(work, as_json)


# --- what the verbs share ---


def read_config(file: Path | None, sets: list[str] | None, flags: dict[str, Any]) -> Config:
    """Lay flags and -s over a config file over the defaults."""
    from headstart.config import build_config

    return build_config(file, [*_parse_flags(flags), *_parse_sets(sets)])


def _parse_flags(flags: dict[str, Any]) -> list[Override]:
    from headstart.config import Override

    return [Override(key, value, f"flag {key}") for key, value in flags.items() if value not in (None, [])]


def _flags(
    data: list[str],
    model: str | None,
    kind: str | None,
    method: str | None,
    out: str | None,
    epochs: float | None,
    eval_data: list[str] | None,
) -> dict[str, Any]:
    """Return the flags that make a run, by their settings."""
    named = {"model": model, "kind": kind, "method": method, "out": out, "epochs": epochs}
    return {"data.train": data, **named, "data.eval": eval_data}


def _whole_numbers(text: str) -> list[int]:
    """Read numbers with commas between them. Raises UsageError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(Problem("usage.flag", f"no numbers in {text!r}", "--rows", "--rows 10,30,100")) from None


def _names(given: list[str] | None) -> list[str]:
    """Return names that were given one by one or with commas between them."""
    return [name.strip() for text in given or [] for name in text.split(",")]


def read_sets(sets: list[str] | None) -> dict[str, Any]:
    """Return the values of -s by key."""
    return {item.key: item.value for item in _parse_sets(sets)}


def _parse_sets(sets: list[str] | None) -> list[Override]:
    from headstart.config import Override

    overrides = []
    for text in sets or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(Problem("usage.flag", f"no value in {text!r}", "-s", "-s key=value"))
        if key.strip() in ("data.prompt", "data.completion", "data.rejected", "data.text", "data.text_pair"):
            value = value.replace("\\n", "\n")  # in a template typed on a command line it means a line break
        overrides.append(Override(key.strip(), value, f"-s {key.strip()}"))
    return overrides


def carry_out(work: Callable[[Display], dict[str, Any]], as_json: bool) -> dict[str, Any]:
    """Run a verb, print its result or its error, and leave with the right exit code.

    With --json the object goes to stdout alone, and what a run says on its way to stderr.
    """
    from headstart.display import Display, hush
    from headstart.machine import disk_error, resources

    display = Display(sys.stderr if as_json else sys.stdout)
    try:
        with display, resources():
            result = work(display)
    except HeadstartError as error:
        _fail(error, as_json)
    except BrokenPipeError:  # whoever read what is printed is gone
        hush(sys.stdout)
        raise typer.Exit(141) from None
    except OSError as error:  # a cache that can't be written, a file that nobody may read
        _fail(disk_error(error), as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        _print_json(result)
    return result


def _print_json(value: Any) -> None:
    """Print one JSON object; all in ASCII where standard output can't spell more, since it must stay JSON."""
    plain = str(getattr(sys.stdout, "encoding", "") or "").lower().startswith("utf")
    print(json_text(value, ensure_ascii=not plain, default=str))


def _fail(error: HeadstartError, as_json: bool) -> NoReturn:
    if as_json:
        _print_json(error.to_json())
    else:
        from headstart.display import Display, hush

        try:
            Display(sys.stderr).line(f"\n{error.describe()}", "red" if error.exit_code != 75 else "yellow")
        except OSError:  # a terminal that is closed: the exit code alone can tell
            hush(sys.stderr)
    raise typer.Exit(error.exit_code)
