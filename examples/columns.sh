#!/usr/bin/env bash
# A CSV file with columns of its own (kind, note, report): templates over columns say what is asked and what is answered.
set -euo pipefail

headstart check visits.csv --show 1 \
    -s data.prompt="Write the {kind} of this visit:\n{note}" -s data.completion="{report}"

headstart tune visits.csv --epochs 2 -o runs/visits \
    -s data.prompt="Write the {kind} of this visit:\n{note}" -s data.completion="{report}"
