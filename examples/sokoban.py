"""One episode of a GEM environment with random moves. Start the server first: rock admin start"""

import random

import rock


def main() -> None:
    env_id = "game:Sokoban-v0-easy"
    env = rock.make(env_id)
    observation, info = env.reset(seed=42)
    print("Initial Observation:\n" + str(observation) + "\n\nInitial Info:\n" + str(info))
    step_count = 0
    while True:
        action = f"\\boxed{{{random.choice(['up', 'left', 'right', 'down'])}}}"
        observation, reward, terminated, truncated, info = env.step(action)
        step_count += 1
        print(f"Step {step_count} - Action: {action} Reward: {reward} {terminated} {truncated}\n{observation}\n{info}")
        if terminated or truncated:
            print("Episode finished!")
            break
    env.close()


if __name__ == "__main__":
    main()
