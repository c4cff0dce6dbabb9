"""Write down what a training stage is asked to do.

python -m rwkvpipe.settings --spec '{"kind":"pretrain","seed":42,"model":{"n_layer":2},"train":{"steps":100}}' --out settings.json
"""  # noqa: E501

from rwkvpipe.base.config import Settings
from rwkvpipe.base.errors import Parser, new_file, run
from rwkvpipe.base.files import write_json
from rwkvpipe.base.strict import check_json


def main(argv: list[str] | None = None) -> None:
    """Check the given settings and write them with every default filled in."""
    parser = Parser(prog="rwkvpipe.settings", description=__doc__.splitlines()[0])
    parser.add_argument("--spec", required=True, help="settings as JSON")
    parser.add_argument("--out", required=True, type=new_file, help="settings.json")
    given = parser.parse_args(argv)
    write_json(given.out, check_json(Settings, given.spec, "--spec").model_dump(mode="json"))


if __name__ == "__main__":
    run(main)
