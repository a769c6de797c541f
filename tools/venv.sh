#!/bin/sh
# Makes a virtual environment and installs into it, on a machine that may have
# nothing but a python3 with pip:
#
#   sh tools/venv.sh PYTHON_VERSIONS FOLDER ARGUMENTS_OF_UV_PIP_INSTALL...
#
# uv and a Python of one of the versions ('3.12 3.13', say; the first found) are
# used where they are and fetched where they are not. uv then goes to .uv/ in
# the current folder, and Python to uv's own.
set -eu
versions=$1
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
  python=${versions%% *} # uv looks further, and fetches it if need be
  # On PATH (where pyenv's may be switched off), and where pyenv keeps them.
  for candidate in $(for version in $versions; do
    echo "python$version" \
      "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python
  done); do
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
