#!/usr/bin/env bash
# Installs what the tests need and runs them, two at a time; further words go to pytest.
#   bash run_scripts/test.sh             the fast tier
#   bash run_scripts/test.sh --smoke     a few tests of every part, in a minute and a half
#   bash run_scripts/test.sh --slow      the tests of more than ten seconds
#   bash run_scripts/test.sh --all       fast and slow
#   bash run_scripts/test.sh --realdata  those that read real scans, from the folder that MG3D_SHARED names
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck source=run_scripts/setup_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_common.sh"
install requirements-test.txt
install requirements-test-nodeps.txt --no-deps

words=(-n 2 --dist loadfile)
case "${1:-}" in
  --smoke) mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.smoke' tests) && shift
    words=(-m smoke "${files[@]}") ;;
  --slow) words+=(-m slow) && shift ;;
  --realdata) words+=(-m realdata) && shift ;;
  --all) shift ;;
  *) words+=(-m "not slow") ;;
esac
exec python -m pytest "${words[@]}" "$@"
