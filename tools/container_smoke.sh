#!/usr/bin/env bash
# Builds the images, starts the stack with three decode workers and sends it a prompt. Needs a Docker daemon; opt-in.
#   tools/container_smoke.sh                      plain
#   IMAGE_BASE=my-python IMAGE_PIP_ARGS=... tools/container_smoke.sh
# COMPOSE may name another compose command; COMPOSE_FILE may add override files, as always.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
compose=${COMPOSE:-docker compose}
export COMPOSE_PROJECT_NAME=isthmus-smoke

finish() {
    status=$?
    [[ $status -eq 0 ]] || $compose logs --tail 40
    $compose down --volumes --timeout 20
    exit $status
}
trap finish EXIT

$compose build
echo '== the router image has no torch'
docker run --rm --network none isthmus-router \
    python -c 'import importlib.util as u, router; assert u.find_spec("torch") is None and u.find_spec("zmq") is None'

echo '== redis, router, one prefill and three decode workers become healthy'
$compose up --detach --wait --wait-timeout 180 --scale decode=3
echo '== a prompt through the public port'
$compose exec -T router isthmus generate 'Once upon a time' --router 127.0.0.1:50051 --max-tokens 16 --json
echo '== a worker that stops leaves, and the stack still answers'
$compose up --detach --wait --wait-timeout 60 --scale decode=1 --no-recreate
$compose exec -T router isthmus generate 'What is 12 + 30?' --router 127.0.0.1:50051 --max-tokens 16 --json
echo 'containers: all passed'
