#!/bin/sh
# From a trained model to an answered request, and nothing left behind.
# Needs scikit-learn for the digits, and forescale[serve]: pip install 'forescale[serve]' scikit-learn
set -eu

here=$(dirname "$0")
work=$(mktemp -d)
export FORESCALE_URL=http://127.0.0.1:${PORT:-8080}

python "$here/digits.py" "$work/digits.pt2"

forescale serve --state "$work/state" --port "${PORT:-8080}" &
server=$!
trap 'kill "$server"; wait "$server" || true; rm -r "$work"' EXIT
until curl --silent --fail --output /dev/null "$FORESCALE_URL/v2/health/live"; do
    kill -0 "$server" # ends the script if the server has ended
    sleep 0.2
done

forescale models add digits "$work/digits.pt2"
forescale deploy digits@1 --wait
curl --silent --data "@$work/digits.json" "$FORESCALE_URL/v2/models/digits/infer"
echo
forescale status
forescale undeploy digits
