#!/bin/sh
# Makes a virtual environment and installs into it, on a machine that may have
# nothing but a python3 with pip:
#
#   sh tools/venv.sh PYTHON_VERSION FOLDER ARGUMENTS_OF_UV_PIP_INSTALL...
#
# uv and then a Python of that version (3.12, say) are used where they are
# found and fetched where they are not; uv goes to .uv/ in the current folder,
# so nothing outside it changes.
set -eu
version=$1
venv=$2
shift 2

works() { "$@" --version >/dev/null 2>&1; }

if works uv; then
  uv=uv
else
  uv=.uv/bin/uv
  # With --target pip asks nothing of the system's own packages, so this also
  # works where they are managed by the distribution.
  works $uv ||
    python3 -m pip install --quiet --only-binary=:all: --target .uv uv || {
    echo "Neither uv nor a pip that can fetch it was found." \
      "Install uv (docs.astral.sh/uv) and try again." >&2
    exit 1
  }
fi

if ! works "$venv/bin/python"; then
  python=$version # uv looks further, and fetches it if need be
  for candidate in "python$version" \
    "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python; do
    if works "$candidate"; then
      python=$candidate
      break
    fi
  done
  rm -rf "$venv"
  $uv venv --quiet --python "$python" "$venv"
fi

# uv does not read pip's configuration; folders of wheels named there are used.
links=$(python3 -m pip config list 2>/dev/null |
  sed -n "s/^.*find-links='\(.*\)'\$/\1/p" | head -n 1)
for link in $links; do
  set -- "$@" --find-links "$link"
done
exec $uv pip install --quiet --python "$venv/bin/python" "$@"
