"""What headstart promises of a run, and the tests that hold it: a table that names them, so that none goes missing.

`python -m tests.unit.test_promises` prints it as it stands in docs/reliability.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from headstart.faults import POINTS
from tests.conftest import is_test
from tests.e2e.test_survival import DISK_FAULTS, KILLS, NOT_BEGUN, WAYS
from tests.mutants import TABLE
from tests.unit.test_files import DAMAGES

ROOT = Path(__file__).parents[2]


class Promise(NamedTuple):
    """What is promised, the tests that hold it (`file::name`), and what isn't held yet."""

    what: str
    tests: tuple[str, ...]
    missing: str = ""


SURVIVAL = "tests/e2e/test_survival.py"
TINY = "tests/e2e/test_tiny_run.py"
FILES = "tests/unit/test_files.py"
PROMISES = (
    Promise(
        "Killed at any named place and carried on, a run is the run that was never killed, bit for bit: weights, moments, "
        "metrics, order of the data, scores. LoRA with dropout and several packs a step, full, labels with an encoder, "
        "embeddings whose adapter is merged at the end, masked text, images, pairs and votes of preferences.",
        (
            f"{SURVIVAL}::test_killed_anywhere_and_gone_on_with_is_never_killed",
            f"{SURVIVAL}::test_killed_again_and_again",
            f"{SURVIVAL}::test_every_place_is_tried",
            f"{TINY}::test_killed_and_resumed_is_never_killed",
        ),
        "each place is tried with one of these ways, not with all",
    ),
    Promise(
        "Killed, asked to stop or out of room at any places in any order, with any settings, it comes to the same: "
        "hypothesis draws both, a few in each test run, more with `HEADSTART_EXAMPLES=50 pytest -k any_schedule`.",
        (f"{SURVIVAL}::test_any_schedule_of_blows_comes_to_the_same",),
        "several processes, a GPU",
    ),
    Promise(
        "Stopped after every single step and carried on each time, a run is the run that was never stopped.",
        (f"{TINY}::test_stopped_at_every_step_and_resumed_is_never_stopped",),
    ),
    Promise(
        "So it is at any moment: `python -m tests.soak` kills by the clock.",
        (),
        "not part of the suite, which times nothing",
    ),
    Promise(
        "A user can see it with a run of their own: `headstart verify-resume RUN`.",
        (f"{SURVIVAL}::test_a_user_can_see_that_nothing_is_lost",),
    ),
    Promise(
        "A checkpoint that is cut, lost, zeroed, changed by a bit, swapped, linked, of another step, run or version is named, "
        "set aside and never used; the newest good one is. A record of the run that is cut is named.",
        (
            f"{FILES}::test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used",
            f"{FILES}::test_no_whole_checkpoint_is_an_error_that_names_each",
            f"{SURVIVAL}::test_a_checkpoint_of_another_run_is_set_aside",
            f"{SURVIVAL}::test_damaged_best_weights_are_told_and_the_last_are_kept",
            f"{SURVIVAL}::test_a_record_that_is_cut_is_named_and_can_be_made_anew",
        ),
    ),
    Promise(
        "A checkpoint that the first version wrote loads and goes on.",
        ("tests/laws/test_golden.py::test_a_checkpoint_of_the_first_version_goes_on",),
    ),
    Promise(
        "A disk that is full, fails, is read-only or has no handles left costs a checkpoint or ends the run with exit 4; the "
        "last good checkpoint and the record stay, and the run says how to go on.",
        (
            f"{SURVIVAL}::test_a_disk_that_fails_ends_the_run_and_loses_nothing",
            f"{SURVIVAL}::test_what_cannot_be_written_for_once_is_told_and_the_run_goes_on",
            f"{SURVIVAL}::test_what_the_system_itself_refuses_is_told_and_loses_nothing",
            f"{SURVIVAL}::test_a_disk_that_stays_full_keeps_the_last_good_checkpoint",
            f"{SURVIVAL}::test_a_run_whose_folder_is_taken_away_says_so",
            f"{FILES}::test_lines_that_the_disk_refused_come_with_the_next_in_order",
            f"{FILES}::test_half_a_line_is_taken_back",
            f"{FILES}::test_what_rust_says_of_the_system_is_a_fault_of_the_system",
            f"{FILES}::test_a_failed_write_leaves_the_old_file_and_nothing_else",
            f"{FILES}::test_a_folder_that_cannot_be_replaced_stays",
        ),
    ),
    Promise(
        "What comes out is there whole or not at all, an adapter and a model that it is merged into.",
        (
            f"{SURVIVAL}::test_a_model_that_is_merged_is_there_whole_or_not_at_all",
            f"{SURVIVAL}::test_killed_anywhere_and_gone_on_with_is_never_killed",
        ),
        "foreign formats: there is no export yet",
    ),
    Promise(
        "What is renamed into its place was synced before, and the folder is synced after: a power cut finds old or new.",
        (f"{FILES}::test_what_is_renamed_was_synced_and_its_folder_is_synced_after",),
    ),
    Promise(
        "SIGTERM, SIGINT and SIGHUP save and stop with exit 75, twice stops at once with exit 130; both go on bit for bit, "
        "in the middle of a save too. Killed in the save that it was asked for, a run goes on from the one before; halted "
        "(SIGSTOP) and let go on, it is the same. An evaluation on the way is broken off, and made anew when the run goes on.",
        (
            f"{SURVIVAL}::test_asked_to_stop_anywhere_it_saves_and_goes_on",
            f"{SURVIVAL}::test_asked_twice_it_stops_at_once_and_loses_nothing",
            f"{SURVIVAL}::test_killed_in_the_save_that_it_was_asked_for_it_loses_nothing",
            f"{SURVIVAL}::test_an_evaluation_that_it_is_asked_to_stop_in_is_broken_off_and_made_anew",
            f"{SURVIVAL}::test_halted_and_let_go_on_it_is_the_same",
            "tests/unit/test_guards.py::test_a_signal_that_is_ignored_stays_ignored",
        ),
    ),
    Promise(
        "A terminal that is closed is a signal to save and stop, though nobody can be told; where whoever reads what a run says "
        "is gone, the run goes on and its log with it.",
        (
            f"{SURVIVAL}::test_a_terminal_that_is_closed_stops_a_run_which_saves_and_goes_on",
            "tests/unit/test_guards.py::test_a_stop_is_heard_where_it_cannot_be_told",
            "tests/unit/test_guards.py::test_whoever_reads_what_a_run_says_may_leave",
        ),
    ),
    Promise(
        "A loss or gradient that isn't finite never reaches the weights; its rows are named, and the step is left out, rolls "
        "back or ends the run with exit 5. Spikes are told. No NaN is logged.",
        (
            f"{SURVIVAL}::test_a_step_that_is_not_finite_is_left_out_told_and_the_same_after_a_stop",
            f"{SURVIVAL}::test_three_in_a_row_end_the_run_and_name_the_last_good_checkpoint",
            f"{SURVIVAL}::test_a_step_that_is_not_finite_can_roll_back_or_end_the_run",
            f"{SURVIVAL}::test_a_spike_stands_out_by_eight_robust_deviations",
            "tests/unit/test_guards.py::test_a_watched_loss_that_is_no_number_is_never_the_best",
        ),
    ),
    Promise(
        "Where the memory runs out in a step it is taken anew in smaller packs, exactly; in scoring, it begins anew; elsewhere "
        "the run ends with exit 4 and goes on.",
        (
            "tests/laws/test_memory.py::test_a_run_on_which_memory_ran_out_says_so_and_goes_on_bit_for_bit",
            f"{SURVIVAL}::test_memory_that_runs_out_in_scoring_costs_time_alone",
            f"{SURVIVAL}::test_memory_that_runs_out_beside_training_ends_the_run_and_loses_nothing",
        ),
        "memory of a real GPU",
    ),
    Promise(
        "One run folder has one writer, who is named; a process that ends lets go. Ten processes make one cache.",
        (
            f"{TINY}::test_two_processes_do_not_write_one_run",
            f"{SURVIVAL}::test_ten_processes_make_one_cache",
        ),
    ),
    Promise(
        "The same run twice gives the same bits, however often it is looked at, watched or saved.",
        (
            f"{TINY}::test_the_same_run_twice_gives_the_same_bits",
            f"{TINY}::test_how_often_one_looks_does_not_change_the_weights",
        ),
    ),
    Promise(
        "Other data, another model, other settings or versions are refused with the difference, or allowed by name and recorded.",
        (
            f"{SURVIVAL}::test_other_settings_and_versions_are_refused_or_allowed_by_name_and_recorded",
            f"{SURVIVAL}::test_more_rows_can_be_allowed_but_never_other_rows_of_the_proof",
            f"{TINY}::test_a_run_goes_on_from_anywhere_and_only_with_what_it_began_with",
        ),
    ),
    Promise(
        "A run that shows no sign of life for five minutes says where it stands, and writes to its log what each thread does; "
        "what a thread that lays out or encodes dies of ends the run. Rows are encoded by threads: there is no process that "
        "could be killed alone.",
        (
            "tests/unit/test_guards.py::test_a_stall_is_told_with_its_place_and_the_stacks_of_all_threads",
            "tests/unit/test_guards.py::test_lines_and_bars_are_signs_of_life",
            "tests/unit/test_guards.py::test_what_a_thread_that_encodes_dies_of_ends_the_reading",
        ),
        "it doesn't end what is stuck; code that never lets go of Python's lock can't be told of",
    ),
    Promise(
        "No network is needed but for a model or data that is named so, and no secret of the environment is written.",
        (f"{SURVIVAL}::test_a_run_needs_no_network_and_writes_no_secret",),
    ),
    Promise(
        "A hub that is down, silent, slow, forbids, limits (429) or fails (5xx) is an error with a cure: silence ends after 30 "
        "seconds, a wait that the hub asks for after a minute, each at most six times a file.",
        (
            "tests/unit/test_source.py::test_a_hub_that_fails_is_an_error_within_limits",
            "tests/unit/test_source.py::test_no_network_is_told_as_such",
        ),
        "a hub that sends a byte now and then is waited for; there are no trackers yet",
    ),
    Promise(
        "A run works without a home or a folder for temporaries that can be written, a terminal, a locale, `/proc/meminfo`, "
        "with a umask of 077, and in folders with spaces, line breaks and letters of any script in their names.",
        (
            "tests/e2e/test_environments.py::test_a_run_in_a_bare_place_without_home_temporaries_terminal_and_locale",
            "tests/e2e/test_environments.py::test_what_standard_output_cannot_spell_is_spelled_out",
            "tests/e2e/test_environments.py::test_memory_is_known_without_proc_meminfo",
        ),
        "a cache that can't be written ends a run on text of over 64 MB, which says so; proxies",
    ),
    Promise(
        "Each sync, rename, hash and check of the code that keeps runs whole is missed by a test when it is taken out: "
        "`python -m tests.mutants`.",
        (),
        "not part of the suite: it runs the suite's tests once for each",
    ),
)


@pytest.mark.parametrize("name", [name for promise in PROMISES for name in promise.tests])
def test_every_promise_has_its_tests(name: str) -> None:
    assert is_test(name)


def test_the_page_is_the_table() -> None:
    assert as_markdown() in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted({file for mutants in TABLE.values() for file, *_ in mutants}))
def test_what_mutants_take_out_stands_in_the_code(file: str) -> None:
    text = (ROOT / "headstart" / file).read_text(encoding="utf-8")
    assert not [old for mutants in TABLE.values() for name, old, _ in mutants if name == file and text.count(old) != 1]


def figures() -> str:
    """Return how much is tried, counted in the tests' own tables."""
    mutants = sum(map(len, TABLE.values()))
    return (
        f"In each test run: {len([*KILLS, *NOT_BEGUN]) + 4 * len(WAYS)} kills at all {len(POINTS)} places, over {len(WAYS)} ways of "
        f"training, four of them in a row for each;\n{len(DISK_FAULTS)} faults of a disk that end a run; {len(DAMAGES)} ways to damage a "
        f"checkpoint. Beside it: {mutants} mutants."
    )


def as_markdown() -> str:
    """Return the figures and the table as they stand in the documentation."""
    lines = [figures(), "", "| promise | held by | not held yet |", "|---|---|---|"]
    for promise in PROMISES:
        tests = "<br>".join(f"`{name.partition('::')[2]}`" for name in promise.tests) or "-"
        lines.append(f"| {promise.what} | {tests} | {promise.missing or '-'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")  # noqa: T201
