mkdir -p /logs/verifier
[ "$(python3 /tmp/add.py 2 40)" = 42 ] && echo 1 > /logs/verifier/reward.txt || echo 0 > /logs/verifier/reward.txt
