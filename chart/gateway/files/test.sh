# `helm test`: checks the health of the gateway, and queues a call. Reads GATEWAY, FUNCTION, QUEUE.
secrets=${SECRETS:-/var/secrets/gateway}
set -- --silent --show-error --max-time 10
# The password goes through curl's configuration on stdin: an argument would be visible in the process list.
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

# Calls only the function named by test.function: calling any other could have side effects.
if [ -z "$FUNCTION" ]; then
  # A working queue checks first that the function exists.
  status=$(curl "$@" --output /dev/null --write-out '%{http_code}' --data '' "$GATEWAY/async-function/gateway-test")
  echo "$status for a queued call of a function that does not exist (expected: 404)"
  [ "$status" = 404 ]
  exit
fi
id=$(curl "$@" --fail --dump-header - --output /dev/null --data '' "$GATEWAY/async-function/$FUNCTION" |
  tr -d '\r' | sed -n 's/^[Xx]-[Cc]all-[Ii]d: //p')
[ -n "$id" ]
echo "queued a call of $FUNCTION: $id"
if [ "$(curl "$@" --output /dev/null --write-out '%{http_code}' "$GATEWAY/async-function/$id")" = 501 ]; then
  echo "this queue does not report the state of a call"
  exit 0
fi
for _ in $(seq 60); do
  state=$(curl "$@" --fail "$GATEWAY/async-function/$id" | sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p')
  # A failure of the function is a result as well: the queue works.
  case $state in
    succeeded | failed | retrying) echo "executed: $state"; exit 0 ;;
    *) sleep 1 ;;
  esac
done
echo "still $state after a minute"
exit 1
