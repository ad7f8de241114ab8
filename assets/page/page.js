'use strict';
const $=id=>document.getElementById(id),D=JSON.parse($('data').textContent),V=$('view'),L=$('list'),Q=$('query'),W=D.words;
const el=(tag,text,cls)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;if(cls)e.className=cls;return e};
const add=(to,...parts)=>{for(const p of parts)to.append(p);return to};
const num=x=>x===null||x===undefined?'–':x===0?'0':Math.abs(x)>=100?x.toFixed(0):Math.abs(x)<1e-4?x.toExponential(1):String(Number(x.toPrecision(3)));
const plain=t=>JSON.stringify(t).slice(1,-1).replaceAll('\\"','"').replaceAll('\\\\','\\');
const tested=f=>f.detection&&f.detection.balanced_accuracy!==null?f.detection.balanced_accuracy:0;
const ORDER={max:f=>-f.max,density:f=>-f.density,score:f=>-(f.score||0),tested:f=>-tested(f),id:f=>+f.id,site:f=>f.site===null?99:f.site};
let shown=[],current=null;
function label(f){return f.label||'(no label)'}
function list(){
  const words=Q.value.toLowerCase().split(/\s+/).filter(Boolean),key=ORDER[$('order').value],site=$('site').value;
  shown=D.features.filter(f=>(site===''||String(f.site)===site)&&words.every(w=>(f.id+' '+label(f)+' '+f.classes.join(' ')).toLowerCase().includes(w)));
  shown.sort((a,b)=>key(a)-key(b)||a.id-b.id);
  L.replaceChildren(...shown.map(f=>{const a=el('a');a.href='#'+f.id;a.dataset.id=f.id;
    const facts=['max '+num(f.max),num(100*f.density)+' %'];if(f.site!==null&&D.about.sites.length>1)facts.push('site '+f.site);
    if(f.score)facts.push('score '+f.score);if(tested(f))facts.push('tested '+num(tested(f)));
    return add(a,el('strong',f.id+' '),el('span',label(f)),el('small',facts.join(' · ')))}));
  $('count').textContent=shown.length+' of '+D.features.length;mark();
}
function mark(){for(const a of L.children){const on=a.dataset.id===current;if(a.classList.toggle('on',on)&&L.offsetParent){
  const top=a.offsetTop-L.offsetTop;if(top<L.scrollTop||top+a.offsetHeight>L.scrollTop+L.clientHeight)L.scrollTop=top-60}}}
function bars(values,names,titles){const b=el('div',undefined,'bars'),m=Math.max(...values,1e-12);
  values.forEach((v,i)=>{const d=el('div'),k=el('i');k.style.height=70*v/m+'px';d.title=(titles||names)[i]+': '+num(v);add(d,k,el('span',String(names[i])));b.append(d)});return b}
function context([words,at,value,pairs,site,weight,doc]){
  const d=el('div',undefined,'context'),near=new Map(pairs),top=Math.max(...near.values(),value,1e-9);
  d.append(el('span','strength '+num(value)+(site===null?'':' · site '+site)+(weight!==1?' · router '+num(weight):'')+' · document '+doc,'meta'));
  words.forEach((w,i)=>{const e=el(i===at?'b':'span',W[w]),v=near.get(i);
    if(v){e.style.background='rgba(var(--hot),'+Math.max(0.1,0.75*Math.max(0,v)/top)+')';e.title=num(v)}d.append(e)});
  return d}
function chips(title,pairs){if(!pairs.length)return;const d=el('div',undefined,'chips');
  for(const [t,v] of pairs){const s=el('span',plain(t));s.title=num(v);d.append(s)}add(V,el('h3',title),d)}
function feature(id){
  const f=D.features.find(x=>x.id===id);current=id;if(!f){V.replaceChildren(el('p','No feature '+id+' on this page'));mark();return}
  V.replaceChildren(el('h2','Feature '+f.id),el('p',label(f)));
  const facts=['max '+num(f.max),'active on '+num(100*f.density)+' % of samples'];
  if(f.category)facts.push(f.category);if(f.score)facts.push('self-rated score '+f.score+'/5');
  for(const k of ['detection','fuzzing'])if(f[k]&&f[k].balanced_accuracy!==null)facts.push(k+' '+num(f[k].balanced_accuracy)+' (n '+f[k].n+')');
  V.append(el('p',facts.join(' · '),'soft'));
  const pair=el('div',undefined,'pair'),h=f.histogram;V.append(pair);
  if(f.sites)pair.append(add(el('div'),el('h3',f.norms?'Decoder norm by site':'Activations by site'),bars(f.sites,D.about.sites,D.about.sites.map(s=>'site '+s))));
  if(h){const edge=i=>num(h.from+(h.to-h.from)*i/h.counts.length),n=h.counts.length;
    pair.append(add(el('div'),el('h3','Strength, a uniform sample of '+h.n),
      bars(h.counts,h.counts.map((_,i)=>i%3?'':edge(i)),h.counts.map((_,i)=>edge(i)+' to '+edge(i+1)))))}
  chips('Its decoder direction promotes',f.promoted);chips('and suppresses',f.suppressed);
  if(f.effect_KL!==null){V.append(el('h3','Removing it changes the next token by '+num(f.effect_KL)+' nats (KL)'));
    chips('less likely without it',f.effect_promoted);chips('more likely without it',f.effect_suppressed)}
  V.append(el('h3','Strongest contexts'));f.contexts.forEach(c=>V.append(context(c)));
  ['strongest quarter','second quarter','third quarter','weakest quarter'].forEach((name,i)=>{const part=f.others.filter(c=>c[7]===i+1);
    if(part.length){V.append(el('h3','A sample of its activations, '+name));part.forEach(c=>V.append(context(c)))}});
  mark();scrollTo(0,0)}
function table(head,rows){const box=el('div',undefined,'scroll'),t=el('table'),h=el('tr');head.forEach(c=>h.append(el('th',c)));t.append(h);
  for(const cells of rows)t.append(add(el('tr'),...cells.map(c=>el('td',c))));return add(box,t)}
function overview(){
  current=null;V.replaceChildren(el('h2',D.about.title),el('p',D.about.line,'soft'));
  if(D.routing){const sites=D.about.sites;
    add(V,el('h3','Share of tokens by site'),bars(D.routing.share.map(s=>100*s),sites,sites.map(s=>'site '+s+', % of tokens')),
      el('h3','Router weight of each token of a sample, by site'));
    const box=el('div',undefined,'scroll tall'),t=el('table',undefined,'map'),head=el('tr');head.append(el('th',''));sites.forEach(s=>head.append(el('th',s)));t.append(head);
    D.routing.sample.tokens.forEach((w,i)=>{const r=el('tr');r.append(el('td',plain(w)));
      D.routing.sample.weights[i].forEach((v,j)=>{const c=el('td');c.style.background='rgba(var(--hot),'+v+')';c.title='site '+sites[j]+': '+num(v);r.append(c)});t.append(r)});
    add(V,add(box,t))}
  const cols=['L0','NormMSE','FVU','KLDiv','Recovered_mean','Dead'];
  if(D.evaluation.length)add(V,el('h3','Evaluation'),table(['SAE',...cols],D.evaluation.map(e=>[e.title,...cols.map(c=>num(e[c]))])));
  if(D.picture){const i=el('img');i.alt='Comparison of the evaluated SAEs';i.src=D.picture;add(V,el('h3','Comparison'),i)}
  V.append(el('p','Choose a feature from the list; the arrow keys or j and k step through it, / goes to the search.','soft'));mark()}
function go(){const id=decodeURIComponent(location.hash.slice(1));id?feature(id):overview()}
function step(n){const i=shown.findIndex(f=>f.id===current),f=shown[Math.min(shown.length-1,Math.max(0,i+n))];if(f)location.hash=f.id}
if(D.about.sites.length>1&&D.features.some(f=>f.site!==null))D.about.sites.forEach(s=>{const o=el('option',s);o.value=s;$('site').append(o)});
else $('site').parentElement.hidden=true;
Q.addEventListener('input',list);$('order').addEventListener('change',list);$('site').addEventListener('change',list);window.addEventListener('hashchange',go);
document.addEventListener('keydown',e=>{if(e.ctrlKey||e.altKey||e.metaKey)return;
  if(e.target===Q||e.target.tagName==='SELECT'){if(e.key==='Escape')e.target.blur();return}
  if(e.key==='ArrowRight'||e.key==='j')step(1);else if(e.key==='ArrowLeft'||e.key==='k')step(-1);else if(e.key==='/'){e.preventDefault();Q.focus()}});
$('home').addEventListener('click',()=>{location.hash=''});$('next').addEventListener('click',()=>step(1));$('back').addEventListener('click',()=>step(-1));
list();go();
