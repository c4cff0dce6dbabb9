"""Made corpora are functions of their seed, and no exam question is trained on."""

import pytest

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.synthetic import SYNTHETIC, generate, in_words


@pytest.mark.parametrize("name", sorted(SYNTHETIC))
def test_equal_seeds_make_equal_corpora(name):
    contents = [[document.words() for document in generate(name, seed, 20)] for seed in (1, 1, 2)]
    assert contents[0] == contents[1] != contents[2]
    assert len(contents[0]) == 20


def test_a_longer_corpus_begins_like_a_shorter_one():
    long, short = list(generate("counting.chats", 1, 20)), list(generate("counting.chats", 1, 5))
    assert [d.messages for d in long[:5]] == [d.messages for d in short]


def test_numbers_are_spelled():
    assert [in_words(n) for n in (0, 13, 20, 21, 99)] == ["zero", "thirteen", "twenty", "twenty-one", "ninety-nine"]


def test_the_right_option_is_the_answer():
    for document in generate("counting.questions", 5, 100):
        assert document.options[document.label] == document.answer
        assert len(set(document.options)) == 4


def test_no_exam_question_is_trained_on():
    exam = {document.question for document in generate("counting.exam", 1, 500)}
    trained = {document.question for document in generate("counting.questions", 2, 3000)}
    trained |= {document.messages[0]["content"] for document in generate("counting.chats", 3, 3000)}
    texts = {document.text for document in generate("counting.documents", 4, 3000)}
    trained |= {f"What comes after {text.rpartition(' ')[0]}?" for text in texts}
    assert len(exam) == 60 and not exam & trained


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="no made corpus counting.chat; did you mean counting.chats"):
        generate("counting.chat", 1, 1)
    with pytest.raises(ConfigError, match="known: .*counting.documents"):
        generate("xyz", 1, 1)
