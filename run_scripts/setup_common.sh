# shellcheck shell=bash
# Sourced by the other scripts: repository root, virtual environment, requirements, process defaults.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1 # relative places in arguments are counted from the root
if [[ -z "${VIRTUAL_ENV:-}" && ( -z "${CONDA_PREFIX:-}" || "${CONDA_DEFAULT_ENV:-}" == base ) ]]; then
  [[ -x .venv/bin/python ]] || "$(command -v python3.11 || command -v python3)" -m venv .venv
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed")'

install() { # install FILE [pip option ...]: at once when FILE has not changed since the last time
  local stamp sum
  stamp="$(python -c 'import sys; print(sys.prefix)')/.mg3d-$1.sha256"
  sum="$(sha256sum <"$1")"
  [[ -f "$stamp" && "$(<"$stamp")" == "$sum" ]] && return
  echo "installing $1 (without a GPU, the README names a much smaller torch wheel to install first)" >&2
  python -m pip install --quiet "${@:2}" -r "$1"
  echo "$sum" >"$stamp" || true
}
install requirements.txt
install requirements-nodeps.txt --no-deps
# CPU runs keep their memory between steps and ask for huge pages: the values of mg3d/training/environment.py.
if [[ ! -e /dev/nvidia0 ]]; then
  : "${THP_MEM_ALLOC_ENABLE:=1}" "${MALLOC_ARENA_MAX:=1}" "${MALLOC_MMAP_MAX_:=0}"
  : "${MALLOC_TRIM_THRESHOLD_:=68719476736}" "${MALLOC_TOP_PAD_:=67108864}" "${OMP_WAIT_POLICY:=PASSIVE}"
  export THP_MEM_ALLOC_ENABLE MALLOC_ARENA_MAX MALLOC_MMAP_MAX_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_ OMP_WAIT_POLICY
fi
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ${NPROC:-1} ? cores / ${NPROC:-1} : 1))}"
