"""The agent, inside a sandbox without network: guesses a number with the help of a model. Standard library only.

    python agent.py SECRET TURNS      writes the number of the last guess to /tmp/guess

The environment variables of the run give the address and the key of the model: OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import json
import os
import sys
import urllib.request


def ask(messages):
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "policy", "messages": messages}).encode(),
        {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["message"]


def main():
    secret, turns = int(sys.argv[1]), int(sys.argv[2])
    messages = [{"role": "system", "content": "Guess my number."}, {"role": "user", "content": "A digit, please."}]
    for _ in range(turns):
        message = ask(messages)
        guess = int(message["content"])
        if guess == secret:
            break
        hint = "Too low." if guess < secret else "Too high."
        messages += [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": hint}]
    with open("/tmp/guess", "w") as file:
        file.write(str(guess))


if __name__ == "__main__":
    main()
