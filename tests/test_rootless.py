"""As root, what an ordinary user has a way of its own for is run again as one: with nothing but a user id."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import kept_packages, unprivileged

# All of the suites: each list by a user of its own, beside the other.
WHOLE = [
    [
        "tests/rocklet/test_streams.py",
        "tests/runtime",
        "tests/image/test_host_image.py",
        "tests/image/test_image_store.py",
        "tests/image/test_layers.py",
        "tests/image/test_packing.py",
    ],
    [
        "tests/cli/test_demo.py",
        "tests/e2e/test_images.py",
        "tests/e2e/test_sessions.py",
        "tests/e2e/test_programs_and_files.py",
        "tests/e2e/test_lifecycle.py",
        "tests/e2e/test_recovery.py",
        "tests/e2e/test_kept_files.py",
        "tests/e2e/test_archiving.py",
        "tests/e2e/test_commit.py",
        "tests/e2e/test_parity.py",
        "tests/e2e/test_keyless.py",
        "tests/e2e/test_volumes.py",
    ],
]

# What `make test` has of them. Left out is what goes the same way whoever runs it: a session's shell, the protocol, the
# store of the admin. Kept is what an ordinary user's kernel does otherwise (user namespaces of one id, overlays with
# user.* attributes, no cgroups of one's own, files that cannot be given away), and of every noun one that goes all
# through it.
SHARE = [
    [
        "tests/runtime/conformance",  # the runtime namespace alone: ROCK_TEST_CONFORM
        "tests/runtime/test_namespace.py",
        "tests/runtime/test_namespace_files.py",
        "tests/runtime/test_namespace_recovery.py",
        "tests/runtime/test_keeping.py",
        "tests/runtime/test_frozen_files.py",
        "tests/runtime/test_merged_layers.py",
        "tests/image/test_host_image.py",
        "tests/image/test_image_store.py::test_a_mounted_layer_stays",
        "tests/image/test_image_store.py::test_a_folder",
        "tests/image/test_image_store.py::test_a_killed_import_leaves_nothing",
        "tests/image/test_layers.py::test_everything_a_system_has",
        "tests/image/test_layers.py::test_attributes",
        "tests/image/test_layers.py::test_deleted_files_are_deleted",
        "tests/image/test_packing.py::test_a_tree_there_and_back",
        "tests/image/test_packing.py::test_parts_are_packed_at_their_place",
    ],
    [
        "tests/cli/test_demo.py::test_the_demo_does_its_job_and_leaves_nothing",
        "tests/e2e/test_images.py::test_a_removed_image_stays_under_its_sandboxes",
        "tests/e2e/test_images.py::test_an_image_is_pulled_when_it_is_first_needed",
        "tests/e2e/test_sessions.py::test_state_lasts",
        "tests/e2e/test_sessions.py::test_a_timeout_gives_what_there_was_and_kills_the_tree",
        "tests/e2e/test_sessions.py::test_interrupt",
        "tests/e2e/test_sessions.py::test_a_terminal",
        "tests/e2e/test_programs_and_files.py::test_execute",
        "tests/e2e/test_programs_and_files.py::test_what_is_missing_is_named",
        "tests/e2e/test_programs_and_files.py::test_a_timeout_kills_the_whole_tree",
        "tests/e2e/test_programs_and_files.py::test_signals_and_input",
        "tests/e2e/test_programs_and_files.py::test_up_and_down_of_files_and_folders",
        "tests/e2e/test_programs_and_files.py::test_traps_in_the_way_of_a_read",
        "tests/e2e/test_programs_and_files.py::test_a_link_never_leads_to_a_file_of_the_host",
        "tests/e2e/test_lifecycle.py::test_a_life",
        "tests/e2e/test_lifecycle.py::test_a_group",
        "tests/e2e/test_lifecycle.py::test_what_cannot_be_given_is_refused_before_start",
        "tests/e2e/test_lifecycle.py::test_memory_is_held",
        "tests/e2e/test_lifecycle.py::test_a_warm_pool_is_claimed_and_refilled",
        "tests/e2e/test_recovery.py::test_sandboxes_sessions_and_processes_are_found_again",
        "tests/e2e/test_recovery.py::test_what_died_meanwhile_is_told",
        "tests/e2e/test_recovery.py::test_kill_in_the_middle_of_starts",
        "tests/e2e/test_kept_files.py::test_files_survive_a_restart",
        "tests/e2e/test_kept_files.py::test_kept_files_survive_a_crash",
        "tests/e2e/test_kept_files.py::test_a_worker_that_lost_the_files_says_so",
        "tests/e2e/test_archiving.py::test_there_and_back",
        "tests/e2e/test_archiving.py::test_deleted_files_and_opaque_folders_stay_so",
        "tests/e2e/test_archiving.py::test_a_crash_while_it_is_archived_or_restored[0.02]",
        "tests/e2e/test_commit.py::test_pushed_and_pulled_again",
        "tests/e2e/test_commit.py::test_of_this_machines_own_system",
        "tests/e2e/test_commit.py::test_of_a_stopped_one",
        "tests/e2e/test_commit.py::test_who_writes_stands_still_and_goes_on",
        "tests/e2e/test_parity.py::test_rewards[namespace]",
        "tests/e2e/test_volumes.py::test_sandboxes_share_a_volume_that_outlives_them",
        "tests/e2e/test_volumes.py::test_deleted_files_count_for_their_volume_alone",
        "tests/e2e/test_volumes.py::test_a_listed_folder_is_read_only",
        "tests/e2e/test_keyless.py::test_code_in_a_sandbox_on_the_network_of_the_host_is_refused",
        "tests/e2e/test_keyless.py::test_clients_of_the_same_account_need_nothing",
        "tests/e2e/test_keyless.py::test_the_sdk_sends_the_key_by_itself",
        "tests/e2e/test_keyless.py::test_a_process_in_another_pid_namespace_needs_the_key",
    ],
]
ALL = bool(os.environ.get("ROCK_TEST_ROOTLESS"))

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="this is the share for root; an ordinary user runs all anyway"
)


def _run(python: str, suites: list[str]) -> subprocess.CompletedProcess[str]:
    with unprivileged.checkout() as checkout:
        chosen = {} if ALL else {"ROCK_TEST_CONFORM": "namespace"}
        played = any("test_demo" in suite for suite in suites)
        if played:
            kept_packages.give(checkout, python)
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={checkout.home / 'pytest'}", *suites],
            cwd=checkout.path, env={**checkout.environment, **chosen}, **checkout.identity,
            capture_output=True, text=True, timeout=3500,
        )  # fmt: skip
        if played and python != os.path.realpath(sys.executable):
            kept_packages.keep(checkout)
        return done


@pytest.mark.timeout(3600)
def test_as_an_ordinary_user(capsys: pytest.CaptureFixture[str]) -> None:
    python = unprivileged.interpreter()
    if python is None:
        pytest.skip("no interpreter of this version that an ordinary user can run")
    suites = WHOLE if ALL else SHARE
    with ThreadPoolExecutor(len(suites)) as threads:
        runs = list(threads.map(lambda suite: _run(python, suite), suites))
    with capsys.disabled():
        for done in runs:
            print(f"\nas an ordinary user: {done.stdout.splitlines()[-1] if done.stdout else done.stderr}")
        if not ALL:
            print("that is a share of it; all: `make rootless`, or ROCK_TEST_ROOTLESS=1")
    for done in runs:
        tail = "\n".join(done.stdout.splitlines()[-150:])
        assert done.returncode == 0, f"{tail}\n{done.stderr[-2000:]}"
