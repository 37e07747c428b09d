# `helm test`: asks the gateway for its health, and queues a call. Reads GATEWAY, FUNCTION, QUEUE.
secrets=${SECRETS:-/var/secrets/gateway}
set -- --silent --show-error --max-time 10
# From a file that curl reads, so that no list of processes shows the password.
api() {
  if [ -f "$secrets/basic-auth-user" ]; then
    printf 'user = "%s:%s"\n' "$(cat "$secrets/basic-auth-user")" "$(cat "$secrets/basic-auth-password")"
  fi | curl --silent --show-error --max-time 10 --config - "$@"
}

curl "$@" --fail "$GATEWAY/_/healthz" && echo " /_/healthz"
curl "$@" --fail "$GATEWAY/_/ready" && echo " /_/ready"
api --fail --output /dev/null "$GATEWAY/system/functions"
echo "OK /system/functions"
[ "$QUEUE" != none ] || exit 0

# Only a function that was named for it is called: who knows what another one does.
if [ -z "$FUNCTION" ]; then
  # A queue that works looks for the function first.
  status=$(curl "$@" --output /dev/null --write-out '%{http_code}' --data '' "$GATEWAY/async-function/gateway-test")
  echo "$status for a queued call of no function (404 is right)"
  [ "$status" = 404 ]
  exit
fi
id=$(curl "$@" --fail --dump-header - --output /dev/null --data '' "$GATEWAY/async-function/$FUNCTION" |
  tr -d '\r' | sed -n 's/^[Xx]-[Cc]all-[Ii]d: //p')
[ -n "$id" ]
echo "queued a call of $FUNCTION: $id"
if [ "$(curl "$@" --output /dev/null --write-out '%{http_code}' "$GATEWAY/async-function/$id")" = 501 ]; then
  echo "this queue does not tell what became of it"
  exit 0
fi
for _ in $(seq 60); do
  state=$(curl "$@" --fail "$GATEWAY/async-function/$id" | sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p')
  # A function's own failure is an answer: the queue has done its part.
  case $state in
    succeeded | failed | retrying) echo "made: $state"; exit 0 ;;
    *) sleep 1 ;;
  esac
done
echo "still $state after a minute"
exit 1
