#!/usr/bin/env bash
# Installs what the tests need and runs them.
#   bash run_scripts/test.sh            the fast tier
#   bash run_scripts/test.sh --slow     the tests of more than ten seconds
#   bash run_scripts/test.sh --all      both; any further word goes to pytest
set -euo pipefail
# shellcheck source=run_scripts/setup_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_common.sh"
install requirements-test.txt
install requirements-test-nodeps.txt --no-deps

tier=(-m "not slow")
case "${1:-}" in
  --slow) tier=(-m slow) && shift ;;
  --all) tier=() && shift ;;
esac
exec python -m pytest "${tier[@]}" "$@"
