"""Workflows that build the matrix on other people's runners: GitHub Actions and GitLab CI, from the same cells.

One job builds both packages of a row, Python and list of capabilities: what a farm does on one machine, without the
machines. On a tag the packages of all jobs are signed by the runner's identity (sigstore) and published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ssm_forge.base.errors import UsageError
from ssm_forge.farm.cells import Cell

Format = Literal["github", "gitlab"]
FORMATS: tuple[Format, ...] = ("github", "gitlab")

# What both services take in one matrix.
_MOST_JOBS = {"github": 256, "gitlab": 200}
_PIXI = "0.77.0"


@dataclass(frozen=True)
class Entry:
    """One job of the matrix; ``archs`` as ``--cuda-arch`` takes them, ``tag`` the same as part of a file's name."""

    variant: str
    python: str
    archs: str
    tag: str


def entries(cells: Sequence[Cell], format_: Format) -> list[Entry]:
    """The jobs for these cells, each once.

    Raises:
        UsageError: when they are more than the service takes.
    """
    jobs = list(dict.fromkeys(Entry(cell.variant.name, cell.python, str(cell.archs), cell.archs.tag) for cell in cells))
    if len(jobs) > _MOST_JOBS[format_]:
        raise UsageError(
            f"{len(jobs)} jobs: a matrix on {format_} has at most {_MOST_JOBS[format_]}.",
            fix="Select fewer with --select, and write several workflows.",
        )
    return jobs


def workflow(cells: Sequence[Cell], format_: Format) -> str:
    """The text of the workflow file that builds these cells.

    Raises:
        UsageError: as :func:`entries`.
    """
    jobs = entries(cells, format_)
    return _github(jobs) if format_ == "github" else _gitlab(jobs)


def _github(jobs: Sequence[Entry]) -> str:
    include = "\n".join(
        f'          - {{ variant: {job.variant}, python: "{job.python}", archs: "{job.archs}", tag: {job.tag} }}'
        for job in jobs
    )
    return _GITHUB.replace("@INCLUDE@", include).replace("@PIXI@", _PIXI)


def _gitlab(jobs: Sequence[Entry]) -> str:
    matrix = "\n".join(
        f'      - {{ VARIANT: "{job.variant}", PYTHON: "{job.python}", ARCHS: "{job.archs}", TAG: "{job.tag}" }}'
        for job in jobs
    )
    return _GITLAB.replace("@MATRIX@", matrix).replace("@PIXI@", _PIXI)


_GITHUB = """\
# Written by './run ci-matrix --format github'; write it again after a change in recipes/variants.yaml.
# For publishing, the repository needs the variable FORGE_CHANNEL (the channel's URL) and the secret
# FORGE_CHANNEL_TOKEN (HOST=TOKEN, see docs/channel.md).
name: packages

on:
  push:
    branches: [main]
    tags: ["v*"]
  pull_request:
  workflow_dispatch:

permissions:
  contents: read

concurrency:
  group: ${{ github.workflow }}-${{ github.ref }}
  cancel-in-progress: ${{ !startsWith(github.ref, 'refs/tags/') }}

jobs:
  build:
    name: ${{ matrix.variant }} py${{ matrix.python }} ${{ matrix.tag }}
    runs-on: ubuntu-24.04
    timeout-minutes: 330
    strategy:
      fail-fast: false
      matrix:
        include:
@INCLUDE@
    env:
      SSM_FORGE_CCACHE_DIR: ${{ github.workspace }}/.ccache
    steps:
      - uses: actions/checkout@v5
        with:
          persist-credentials: false
      - uses: prefix-dev/setup-pixi@v0.9.3
        with:
          pixi-version: v@PIXI@
          environments: default
          locked: true
          cache: true
      # What another Python, or an earlier run, compiled of the same kernels is not compiled again.
      - uses: actions/cache@v4
        with:
          path: .ccache
          key: ccache-${{ matrix.variant }}-${{ matrix.tag }}-${{ matrix.python }}-${{ github.run_id }}
          restore-keys: |
            ccache-${{ matrix.variant }}-${{ matrix.tag }}-${{ matrix.python }}-
            ccache-${{ matrix.variant }}-${{ matrix.tag }}-
      # Only in variables, which no shell takes for a command.
      - run: pixi run farm --source conda --select "variant=$VARIANT python=$PYTHON" --cuda-arch "$ARCHS"
        env:
          VARIANT: ${{ matrix.variant }}
          PYTHON: ${{ matrix.python }}
          ARCHS: ${{ matrix.archs }}
      - uses: actions/upload-artifact@v4
        with:
          name: packages-${{ matrix.variant }}-py${{ matrix.python }}-${{ matrix.tag }}
          path: channel/linux-64/*.conda
          if-no-files-found: error
          compression-level: 0
      - uses: actions/upload-artifact@v4
        if: ${{ !cancelled() }}
        with:
          name: report-${{ matrix.variant }}-py${{ matrix.python }}-${{ matrix.tag }}
          path: |
            .pixi/farm/*.html
            .pixi/farm/logs
            .pixi/logs

  publish:
    needs: build
    if: startsWith(github.ref, 'refs/tags/')
    runs-on: ubuntu-24.04
    environment: publish
    permissions:
      contents: read
      # The runner's identity signs: there is no key to keep.
      id-token: write
      attestations: write
    steps:
      - uses: actions/checkout@v5
        with:
          persist-credentials: false
      - uses: prefix-dev/setup-pixi@v0.9.3
        with:
          pixi-version: v@PIXI@
          environments: default
          locked: true
          cache: true
      - uses: actions/download-artifact@v5
        with:
          pattern: packages-*
          merge-multiple: true
          path: channel/linux-64
      - id: attest
        uses: actions/attest-build-provenance@v3
        with:
          subject-path: channel/linux-64/*.conda
      - run: pixi run publish --to "$FORGE_CHANNEL" --attestation "$BUNDLE"
        env:
          FORGE_CHANNEL: ${{ vars.FORGE_CHANNEL }}
          SSM_FORGE_CHANNEL_TOKEN: ${{ secrets.FORGE_CHANNEL_TOKEN }}
          BUNDLE: ${{ steps.attest.outputs.bundle-path }}
"""

_GITLAB = """\
# Written by './run ci-matrix --format gitlab'; write it again after a change in recipes/variants.yaml.
# For publishing, the project needs the variables FORGE_CHANNEL (the channel's URL) and SSM_FORGE_CHANNEL_TOKEN
# (HOST=TOKEN, protected and masked; see docs/channel.md).
stages: [build, publish]

default:
  image: ghcr.io/prefix-dev/pixi:@PIXI@
  interruptible: true

variables:
  PIXI_CACHE_DIR: $CI_PROJECT_DIR/.pixi-cache
  SSM_FORGE_CCACHE_DIR: $CI_PROJECT_DIR/.ccache

workflow:
  rules:
    - if: $CI_PIPELINE_SOURCE == "merge_request_event"
    - if: $CI_COMMIT_TAG
    - if: $CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH

build:
  stage: build
  timeout: 5h 30m
  parallel:
    matrix:
@MATRIX@
  cache:
    # What another Python, or an earlier run, compiled of the same kernels is not compiled again.
    - key: ccache-$VARIANT-$TAG
      paths: [.ccache]
      when: always
    - key:
        files: [pixi.lock]
      paths: [.pixi-cache]
  script:
    - pixi run --locked farm --source conda --select "variant=$VARIANT python=$PYTHON" --cuda-arch "$ARCHS"
  artifacts:
    when: always
    paths:
      - channel/linux-64/*.conda
      - .pixi/farm/*.html
      - .pixi/farm/logs
      - .pixi/logs

publish:
  stage: publish
  needs: [build]
  interruptible: false
  environment: publish
  rules:
    - if: $CI_COMMIT_TAG
  # The runner's identity signs: there is no key to keep.
  id_tokens:
    SIGSTORE_ID_TOKEN:
      aud: sigstore
  script:
    - |
      cat >predicate.json <<END
      {"buildDefinition": {"buildType": "https://docs.gitlab.com/ci/",
        "externalParameters": {"repository": "$CI_PROJECT_URL", "ref": "$CI_COMMIT_TAG", "commit": "$CI_COMMIT_SHA"}},
       "runDetails": {"builder": {"id": "$CI_SERVER_URL"}, "metadata": {"invocationId": "$CI_PIPELINE_URL"}}}
      END
    - >-
      pixi exec --spec sigstore sigstore attest --predicate predicate.json
      --predicate-type https://slsa.dev/provenance/v1 channel/linux-64/*.conda
    - |
      set -- --to "$FORGE_CHANNEL"
      for bundle in channel/linux-64/*.sigstore.json; do set -- "$@" --attestation "$bundle"; done
      pixi run --locked publish "$@"
"""
