use std::path::PathBuf;

use super::*;

fn read(text: &str, files: &[(&str, &str)]) -> Stack {
    let var = |name: &str| (name == "WHO").then(|| "world".to_owned());
    let file = |path: &Path| {
        let found = files.iter().find(|(name, _)| path == PathBuf::from("/stacks").join(name));
        found.map(|(_, text)| (*text).to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
    };
    parse(text, &Source { directory: Path::new("/stacks"), var: &var, read: &file })
}

#[track_caller]
fn errors(text: &str) -> Vec<String> {
    read(text, &[]).errors.iter().map(ToString::to_string).collect()
}

#[test]
fn a_stack_file_of_faas_cli_is_parsed() {
    let stack = read(
        "version: 1.0\n\
         provider:\n  name: openfaas\n  gateway: http://127.0.0.1:8080\n\
         functions:\n\
         \x20 echo:\n    lang: dockerfile\n    handler: ./echo\n    image: echo:latest\n    fprocess: cat\n\
         \x20   environment:\n      write_debug: true\n      exec_timeout: 5\n      note: hi\n\
         \x20   labels:\n      com.openfaas.scale.max: 5\n\
         \x20   limits:\n      memory: 128Mi\n\
         \x20 also:\n    envProcess: env\n    namespace: dev\n    secrets: [token]\n\
         configuration:\n  templates: []\n",
        &[],
    );
    assert_eq!(stack.errors, []);
    let [also, echo] = stack.functions.as_slice() else { panic!("{stack:?}") };
    assert_eq!((also.service.as_str(), also.namespace.as_str()), ("also", "dev"));
    assert_eq!(also.secrets.as_deref(), Some(&["token".to_owned()][..]));
    assert_eq!((echo.env_process.as_str(), echo.working_directory.as_str()), ("cat", "/stacks"));
    let vars = echo.env_vars.as_ref().unwrap();
    assert_eq!((&*vars["write_debug"], &*vars["exec_timeout"]), ("true", "5"));
    assert_eq!(echo.labels.as_ref().unwrap()["com.openfaas.scale.max"], "5");
    assert_eq!(echo.limits.as_ref().unwrap().memory, "128Mi");
}

#[test]
fn variables_and_environment_files_are_applied() {
    let stack = read(
        "functions:\n  f:\n    fprocess: echo ${WHO} ${NOBODY:-nobody}\n    environment: {a: 1, b: 2}\n    \
         environment_file: [one.yml, sub/two.yml]\n",
        &[
            ("one.yml", "environment:\n  b: 3\n  c: ${WHO}\n"),
            ("sub/two.yml", "environment: {c: true}"),
        ],
    );
    assert_eq!(stack.errors, []);
    let [function] = stack.functions.as_slice() else { panic!("{stack:?}") };
    assert_eq!(function.env_process, "echo world nobody");
    let vars: Vec<_> = function.env_vars.as_ref().unwrap().values().map(String::as_str).collect();
    assert_eq!(vars, ["1", "3", "true"]);
}

#[test]
fn all_errors_are_reported_with_line_key_and_remedy() {
    let stack = read(
        "version: 1.0\n\
         provder: {name: openfaas}\n\
         functions:\n\
         \x20 good: {fprocess: cat}\n\
         \x20 typo:\n    fprocess: cat\n    environement: {a: 1}\n\
         \x20 piped:\n    fprocess: cat | wc -l\n\
         \x20 twice: {fprocess: cat}\n\
         \x20 image: {image: x}\n\
         \x20 unset:\n    fprocess: cat\n    environment:\n      key: ${NOT_SET}\n\
         \x20 twice: {fprocess: env}\n\
         \x20 file:\n    fprocess: cat\n    environment_file: [none.yml]\n\
         \x20 kinds: {fprocess: [cat], secrets: {a: b}, labels: [x], readonly_root_filesystem: maybe}\n\
         \x20 Bad_Name: {fprocess: cat}\n",
        &[],
    );
    let messages: Vec<_> = stack.errors.iter().map(ToString::to_string).collect();
    let expected = [
        ("line 2: provder: ", "did you mean provider?"),
        ("line 7: functions.typo.environement: ", "did you mean environment?"),
        ("line 9: functions.piped.fprocess: ", "sh -c 'cat | wc -l'"),
        ("line 11: functions.image.fprocess: ", "missing"),
        ("line 15: functions.unset.environment.key: ", "NOT_SET is not set"),
        ("line 16: functions.twice: ", "first on line 10"),
        ("line 19: functions.file.environment_file: ", "cannot read none.yml"),
        ("line 20: functions.kinds.fprocess: ", "must be a string"),
        ("line 20: functions.kinds.secrets: ", "must be a list"),
        ("line 20: functions.kinds.labels: ", "must be a map"),
        ("line 20: functions.kinds.readonly_root_filesystem: ", "\"maybe\" is not true or false"),
        ("line 21: functions.Bad_Name: ", "a-z, 0-9 and -"),
    ];
    assert_eq!(messages.len(), expected.len(), "{messages:#?}");
    for (place, remedy) in expected {
        let found =
            messages.iter().any(|message| message.starts_with(place) && message.contains(remedy));
        assert!(found, "{place} {remedy}: {messages:#?}");
    }
    assert!(stack.is_readable && stack.functions.iter().map(|f| &f.service).eq(["good"]));
    assert_eq!(stack.invalid.len(), 8, "{:?}", stack.invalid);
}

#[test]
fn a_file_without_functions_is_not_readable() {
    for text in
        ["", "version: 1.0\n", "functions:\n", "functions: {}", "functions: [", "functions: 5"]
    {
        let stack = read(text, &[]);
        assert!(!stack.is_readable && !stack.errors.is_empty(), "{text:?}: {stack:?}");
    }
    assert!(errors("functions: {")[0].contains("not YAML"));
    assert!(errors("functions: {f: {fprocess: cat}, g: 7}")[0].contains("functions.g"));
}

#[test]
fn an_error_in_an_environment_file_has_the_name_of_the_file() {
    let text = "functions: {f: {fprocess: cat, environment_file: e.yml}}";
    for (file, expect) in [
        ("environment: [", "e.yml: line"),
        ("enviroment: {a: 1}", "did you mean environment?"),
        ("a: ~", "unknown key"),
        ("", "e.yml has no map `environment`"),
        ("environment: {a: '${NONE}'}", "e.yml: line 1: environment.a: the variable NONE"),
    ] {
        let stack = read(text, &[("e.yml", file)]);
        let message = stack.errors[0].to_string();
        assert!(message.starts_with("line 1: functions.f.environment_file: "), "{message}");
        assert!(message.contains(expect), "{file}: {message}");
    }
}
