"""Makes a folder of AppWorld's shape with one small task, by AppWorld's own code. Runs where that is installed.

    python small_appworld.py ROOT
"""

import json
import os
import sys

root = sys.argv[1]
os.environ["APPWORLD_ROOT"] = root
os.environ["APPWORLD_CACHE"] = "/tmp/appworld-cache"
TASK = "abc1234_1"
QUESTION = "What is six times seven?"
META = {"mode": "minimal", "difficulty": 1, "num_apps": 1, "num_apis": 1, "num_api_calls": 1,
        "num_solution_code_lines": 1}  # fmt: skip
PERSON = {"first_name": "Joy", "last_name": "Doe", "email": "joy@example.com", "phone_number": "5551234567"}
EVALUATION = """
import json


def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):
    task = models.end.supervisor.Task.find_one()
    with test("the answer is right"):
        test.answer(json.loads(task.answer), ground_truth_answer)
    with test("the task is completed"):
        test.case(task.status, "==", "success")
"""


def main() -> None:
    import appworld.install

    if not os.path.isdir(os.path.join(os.path.dirname(appworld.__file__), "apps", "admin")):
        appworld.install.install_package()
    from appworld.apps import get_all_apps
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.collections.models import ModelCollection
    from appworld.common.constants import DB_VERSION

    apps = [*get_all_apps(skip_admin=True), "admin"]
    memory = ":memory:base"
    made = ModelCollection.load(memory, memory, apps, create_db=True)
    person = {**PERSON, "birthday": "1990-01-01", "sex": "female"}
    made.admin.MainUser(**person).save()
    supervisor = made.supervisor.Supervisor(**person)
    supervisor.save()
    made.supervisor.Task(supervisor_id=supervisor.id, instruction=QUESTION).save()
    folder = os.path.join(root, "data", "tasks", TASK)
    truth = os.path.join(folder, "ground_truth")
    os.makedirs(os.path.join(folder, "dbs"), exist_ok=True)
    os.makedirs(truth, exist_ok=True)
    made.save(os.path.join(folder, "dbs"), delete_if_exists=True)
    specs = {"instruction": QUESTION, "supervisor": PERSON, "datetime": "2023-05-18T12:00:00", "db_version": DB_VERSION}
    files = {
        f"{folder}/specs.json": specs, f"{truth}/metadata.json": META,
        f"{truth}/public_data.json": {}, f"{truth}/private_data.json": {}, f"{truth}/answer.json": 42,
        f"{truth}/required_apps.json": ["supervisor"],
        f"{truth}/test_data.json": [{"requirement": "the answer is right", "label": "no_op_fail"},
                                    {"requirement": "the task is completed", "label": "no_op_fail"}],
    }  # fmt: skip
    for path, value in files.items():
        with open(path, "w") as file:
            json.dump(value, file)
    with open(f"{truth}/evaluation.py", "w") as file:
        file.write(EVALUATION)
    docs = os.path.join(root, "data", "api_docs", "standard")
    os.makedirs(docs)
    for app, apis in ApiDocCollection.build().items():
        with open(f"{docs}/{app}.json", "w") as file:
            json.dump({name: {**doc, "canary_string": ""} for name, doc in apis.items()}, file)
    os.makedirs(os.path.join(root, "data", "datasets"), exist_ok=True)
    for split in ("train", "dev", "test_normal", "test_challenge"):
        with open(os.path.join(root, "data", "datasets", f"{split}.txt"), "w") as file:
            file.write(f"{TASK}\n" if split == "train" else "")


main()
