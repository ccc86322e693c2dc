"""The texts of the rating page in each language."""

TEXTS = {  # key: (English, Russian)
    "title": ("Rate the answers", "Оцените ответы"),
    "hint": (
        "Grades: 1 very bad, 2 bad, 3 fair, 4 good, 5 very good. The answers are in random order.",
        "Оценки: 1 — очень плохо, 2 — плохо, 3 — средне, 4 — хорошо, 5 — отлично. Порядок ответов случайный.",
    ),
    "criteria": ("What the criteria mean", "Что означают критерии"),
    "relevance": ("Relevance", "Релевантность"),
    "clarity": ("Clarity", "Ясность"),
    "completeness": ("Completeness", "Полнота"),
    "originality": ("Originality", "Оригинальность"),
    "style": ("Style", "Стиль"),
    "about_relevance": ("answers the question that was asked", "отвечает именно на заданный вопрос"),
    "about_clarity": ("is easy to follow", "легко читать и понимать"),
    "about_completeness": ("leaves out nothing important", "не упускает ничего важного"),
    "about_originality": ("goes beyond the obvious", "не сводится к общим фразам"),
    "about_style": ("has a tone that suits the question", "тон и язык подходят к вопросу"),
    "prompt": ("Question", "Вопрос"),
    "system": ("Instruction", "Инструкция"),
    "user": ("User", "Пользователь"),
    "assistant": ("Assistant", "Ассистент"),
    "human": ("Human answer, for comparison", "Ответ человека для сравнения"),
    "answer": ("Answer", "Ответ"),
    "empty": ("(empty answer)", "(пустой ответ)"),
    "preference": ("Which answer is better?", "Какой ответ лучше?"),
    "tie": ("Equal", "Одинаково"),
    "previous": ("Previous", "Назад"),
    "next": ("Next", "Дальше"),
    "rated": ("rated", "оценено"),
    "name": ("Your name", "Ваше имя"),
    "download": ("Download ratings", "Скачать оценки"),
    "saved": ("Saved in this browser", "Сохранено в браузере"),
    "unsaved": (
        "This browser cannot save your ratings: download them before you close the page.",
        "Браузер не может сохранить оценки: скачайте их, прежде чем закрыть страницу.",
    ),
    "all_done": (
        "All done. Download the ratings and send the file back.",
        "Всё оценено. Скачайте оценки и отправьте файл обратно.",
    ),
    "keys": (
        "Keys: 1–5 for a grade; up and down for the criterion; left and right for the question",
        "Клавиши: 1–5 — оценка; вверх и вниз — критерий; влево и вправо — вопрос",
    ),
    "keys_pairs": (
        "Keys: 1–5 for a grade; A, B or = for the better answer; up and down for the criterion; "
        "left and right for the question",
        "Клавиши: 1–5 — оценка; A, B или = — лучший ответ; вверх и вниз — критерий; влево и вправо — вопрос",
    ),
}
LABELS = {language: {key: texts[i] for key, texts in TEXTS.items()} for i, language in enumerate(("en", "ru"))}
